# SPDX-License-Identifier: Apache-2.0
"""In a container of a snapshot: prove that it holds what it says.

    python3 -m workspace.container.self_test RECORD

RECORD is the JSON of the image's label. Each step prints one line; the first that fails ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workspace.container.restore import PLACE, RECORD, files_as_they_are
from workspace.host.errors import WorkspaceError
from workspace.host.git import git

IMPORT = """
import json, time
start = time.perf_counter()
import torch, vllm
print(json.dumps({
    "seconds": time.perf_counter() - start, "file": vllm.__file__, "vllm": vllm.__version__,
    "torch": torch.__version__}))
"""
LOAD = """
from custom_kernels import registry
for backend in registry.compiled():
    backend.library()
print(", ".join(map(str, registry.compiled())))
"""


def _device() -> str:
    """Of the vLLM in the image: it is proved also where there is no GPU."""
    manifest = PLACE / "vllm-fork" / "src" / ".git" / "workspace-binaries.json"
    return str(json.loads(manifest.read_text())["device"])


def _run(*command: str, check: bool = True) -> str:
    result = subprocess.run(
        command, cwd=PLACE, env={**os.environ, "DEVICE": _device()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if check and result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no message"]
        sys.exit(f"{' '.join(command[:3])} … failed: {lines[-1]}")
    return result.stdout + result.stderr


def imports() -> str:
    """vLLM comes from the editable tree."""
    told = json.loads(_run("python3", "-c", IMPORT).splitlines()[0])
    source = Path(told["file"]).resolve()
    if not source.is_relative_to(PLACE / "vllm-fork" / "releases"):
        sys.exit(f"vllm is imported from {source}, not from the editable tree")
    return (
        f"vLLM {told['vllm']} from {source.parents[1].relative_to(PLACE)}, torch {told['torch']}, "
        f"imported in {told['seconds']:.1f} s"
    )


def versions() -> str:
    """The doctor finds every version at its pin."""
    told = _run("make", "--no-print-directory", "doctor", "JSON=1", check=False)
    checks = json.loads(told)["checks"]
    # Only a missing GPU is not the snapshot's fault.
    for check in checks:
        if check["status"] == "problem" and check["name"] != "GPU":
            sys.exit(f"make doctor: {check['name']}: {check['detail']}")
    good = [check["name"] for check in checks if check["status"] == "ok"]
    return f"make doctor: {', '.join(good)}"


def nothing_to_do() -> str:
    """`make dev` neither compiles nor installs nor fetches anything."""
    start = time.perf_counter()
    lines = _run("make", "--no-print-directory", "dev").split("\n")
    did = [line for line in lines if line.strip() and line.strip() != "· ready"]
    if did:
        sys.exit(f"make dev had something to do: {did[0].strip()}")
    return f"make dev has nothing to do, {time.perf_counter() - start:.1f} s"


def kernels() -> str:
    """Every compiled kernel loads."""
    return f"kernels load: {_run('python3', '-c', LOAD).splitlines()[-1]}"


def made_again(tree: Path, name: str, told: dict) -> None:
    """The recorded commit with the recorded diff is, file for file, what is in the image."""
    if (found := git("rev-parse", "HEAD", tree=tree).strip()) != told["commit"]:
        sys.exit(f"{tree} is at {found}, but the label says {told['commit']}")
    with tempfile.TemporaryDirectory() as work:
        scratch = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", told["commit"], tree=tree, env=scratch)
        diff = RECORD / f"{name}.diff"
        if diff.stat().st_size:
            git("apply", "--cached", "--whitespace=nowarn", str(diff), tree=tree, env=scratch)
        again = git("write-tree", tree=tree, env=scratch).strip()
    here = files_as_they_are(tree)
    if not again == here == told["tree"]:
        sys.exit(f"{tree} is not what commit {told['commit']} with {diff.name} makes")


def state(record: dict) -> str:
    """The checkout and the fork's trees can be made again from what is recorded."""
    if json.loads((RECORD / "record.json").read_text()) != record:
        sys.exit("the record in the image is not the one of its label")
    made_again(PLACE, "workspace", record["workspace"])
    for version, told in record["fork"].items():
        made_again(PLACE / "vllm-fork" / "releases" / version, f"vllm-{version}", told)
    commits = sum(told["own_commits"] for told in record["fork"].values())
    return f"commit {record['workspace']['commit'][:10]}, {commits} local commits in the fork"


def main(record: dict) -> None:
    for line in (lambda: state(record), nothing_to_do, imports, kernels, versions):
        print(f"✓ {line()}", flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except WorkspaceError as error:
        sys.exit(str(error))
