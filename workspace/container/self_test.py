# SPDX-License-Identifier: Apache-2.0
"""In a container of a snapshot: verify that it holds what its label says.

    python3 -m workspace.container.self_test RECORD

RECORD is the JSON of the image's label. Each step prints one line; the first failure ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workspace.container.restore import (
    CHECKOUT,
    RECORD,
    Record,
    TreeRecord,
    files_as_they_are,
)
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
    """The device of the image's vLLM, whether or not this machine has a GPU."""
    manifest = CHECKOUT / "vllm-fork" / "src" / ".git" / "workspace-binaries.json"
    return str(json.loads(manifest.read_text())["device"])


def _run(*command: str, check: bool = True) -> str:
    result = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "DEVICE": _device()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if check and result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no message"]
        sys.exit(f"{' '.join(command[:3])} … failed: {lines[-1]}")
    return result.stdout + result.stderr


def imports() -> str:
    """vLLM is imported from the editable tree."""
    imported = json.loads(_run("python3", "-c", IMPORT).splitlines()[0])
    source = Path(imported["file"]).resolve()
    if not source.is_relative_to(CHECKOUT / "vllm-fork" / "releases"):
        sys.exit(f"vllm is imported from {source}, not from the editable tree")
    return (
        f"vLLM {imported['vllm']} from {source.parents[1].relative_to(CHECKOUT)}, torch "
        f"{imported['torch']}, imported in {imported['seconds']:.1f} s"
    )


def versions() -> str:
    """`make doctor` reports no problem, except a missing GPU."""
    report = _run("make", "--no-print-directory", "doctor", "JSON=1", check=False)
    checks = json.loads(report)["checks"]
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


def require_recorded(tree: Path, name: str, recorded: TreeRecord) -> None:
    """The recorded commit with the recorded diff is, file for file, what is in the image."""
    if (head := git("rev-parse", "HEAD", tree=tree).strip()) != recorded["commit"]:
        sys.exit(f"{tree} is at {head}, but the label says {recorded['commit']}")
    with tempfile.TemporaryDirectory() as work:
        scratch = {"GIT_INDEX_FILE": str(Path(work) / "index")}
        git("read-tree", recorded["commit"], tree=tree, env=scratch)
        diff = RECORD / f"{name}.diff"
        if diff.stat().st_size:
            git("apply", "--cached", "--whitespace=nowarn", str(diff), tree=tree, env=scratch)
        reconstructed = git("write-tree", tree=tree, env=scratch).strip()
    if not reconstructed == files_as_they_are(tree) == recorded["tree"]:
        sys.exit(f"{tree} is not what commit {recorded['commit']} with {diff.name} makes")


def state(record: Record) -> str:
    """The checkout and the fork's trees can be reconstructed from the record."""
    if json.loads((RECORD / "record.json").read_text()) != record:
        sys.exit("the record in the image is not the one of its label")
    require_recorded(CHECKOUT, "workspace", record["workspace"])
    for version, fork in record["fork"].items():
        require_recorded(CHECKOUT / "vllm-fork" / "releases" / version, f"vllm-{version}", fork)
    commits = sum(fork["own_commits"] for fork in record["fork"].values())
    return f"commit {record['workspace']['commit'][:10]}, {commits} local commits in the fork"


def main(record: Record) -> None:
    for line in (lambda: state(record), nothing_to_do, imports, kernels, versions):
        print(f"✓ {line()}", flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except WorkspaceError as error:
        sys.exit(str(error))
