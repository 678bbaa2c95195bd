# SPDX-License-Identifier: Apache-2.0
"""A bundle for this very machine as the host: real parts, a Python that lacks packages, no network.

The small checkout is packed, with work of a user's own in it, and unpacked elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.workspace.conftest import BASE_PYTHON, NOBODY, ODD, Checkout, copy_checkout
from workspace.bundle import unbundle
from workspace.bundle.packages import TOOL_CHAIN
from workspace.environment import index, inventory, uv
from workspace.pins.model import load

VERSION = load().vllm.default
LACKING = {"rich", "pydantic", "pydantic-core", "pypi-simple", "mailbits"}
EDITABLE = {"vllm", "custom-kernels"}
CLOSED = f"{NOBODY}/simple"

pytestmark = pytest.mark.slow


@dataclass
class Host:
    """A machine without a network, and the folder to which a bundle was copied."""

    folder: Path
    env: dict[str, str]
    python: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def checkout(self) -> Checkout:
        return Checkout(self.folder / "ws", self.env)

    def unbundle(self, folder: str = "ws", **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(folder, **env)
        output, _ = process.communicate()
        return subprocess.CompletedProcess(folder, process.returncode, output, "")

    def start(self, folder: str = "ws", **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*offline(), self.python, self.bundle / "unbundle.py", folder],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def left(self) -> list[Path]:
        """What an unfinished run left."""
        return [*self.folder.glob(".partial-*"), *self.folder.glob("ws/.workspace/.partial-*"),
                *self.folder.glob("ws/vllm-fork/releases/.partial-*")]  # fmt: skip


def offline() -> list[str]:
    """A command that cuts the network where this user may, else nothing: the index is closed."""
    command = ["unshare", "-n"]
    done = subprocess.run([*command, "true"], capture_output=True, check=False) if shutil.which(
        "unshare"
    ) else None  # fmt: skip
    return command if done and done.returncode == 0 else []


def host_python(folder: Path) -> Path:
    """An environment whose packages are this one's, without some: links, so it takes no time."""
    binary = uv.obtain(sys.executable)
    python = folder / "bin" / "python"
    # A bare Debian's venv cannot bring pip, and uv's --seed would bring setuptools, too.
    environment = os.environ | index.uv_environment()
    for command in (["venv", "--python", BASE_PYTHON, folder],
                    ["pip", "install", "--python", python, "pip"]):  # fmt: skip
        subprocess.run([binary, *command, "-q"], check=True, env=environment)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    there, here = Path(said.stdout.strip()), Path(sysconfig.get_path("purelib"))
    for distribution in metadata.distributions(path=[str(here)]):
        if canonicalize_name(distribution.metadata["Name"]) in LACKING | EDITABLE:
            continue
        for name in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (there / name).exists():
                (there / name).symlink_to(here / name)
    # What `make dev` brought along for a bare system: such a host cannot fetch it.
    for path in here.glob("workspace-*.pth"):
        (there / path.name).symlink_to(path)
    return python


def write_inventory(python: Path, path: Path) -> None:
    """As the host would, but as if it had neither pip nor uv: the bundle brings uv then."""
    subprocess.run([python, inventory.__file__, path], check=True)
    taken = json.loads(path.read_text())
    taken["packages"].pop("pip", None)
    taken["tools"]["uv"] = None
    path.write_text(json.dumps(taken))


@pytest.fixture(scope="module")
def packed(_small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle in many parts, for a host that lacks packages, with commits and edits in it."""
    if load().release().binaries.get("cpu", {}).get(os.uname().machine) is None:
        pytest.skip("no CPU binaries for this machine")
    folder = tmp_path_factory.mktemp("bundle")
    python = host_python(folder / ODD / "host")
    checkout = copy_checkout(_small_template, folder)
    (checkout.root / "mine.txt").write_text("not committed yet\n")
    for command in (["init", "-qb", "main"], ["add", "Makefile", "workspace", ".gitignore"],
                    ["add", "kernels", "locks", "pins.toml", "vllm-fork/patches"],
                    ["commit", "-qm", "ours"]):  # fmt: skip
        identity = ["-c", "user.name=U", "-c", "user.email=u@example.invalid"]
        subprocess.run(["git", *identity, *command], cwd=checkout.root, check=True)
    made = checkout.make("dev")
    assert made.returncode == 0, made.stdout
    (checkout.src / "vllm" / "kept.py").write_text("own = 'commit'\n")
    checkout.git("commit", "-qam", "my change")
    (checkout.src / "vllm" / "__init__.py").write_text("VALUE = 'my edit'\n")
    write_inventory(python, folder / "inventory.json")
    result = checkout.make("bundle", f"TARGET={folder / 'inventory.json'}", "PARTS=600K")
    assert result.returncode == 0, result.stdout
    assert "uncommitted, and in the bundle (workspace): ?? mine.txt" in result.stdout
    (made_folder,) = (checkout.root / "bundle").iterdir()
    yield made_folder
    shutil.rmtree(folder)


def host_with(packed: Path, folder: Path) -> Host:
    """The machine with a fresh copy of the bundle, and with an empty cache."""
    origin = packed.parents[2]
    shutil.copytree(packed, folder / "bundle")
    kernels = next(iter(origin.parents[2].glob("template*/*/*/kernels")))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_", "GIT_"))}
    for name in ("PYTHON", "ENV", "DEVICE", "FROM", "K", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        env.pop(name, None)
    env |= {
        "WORKSPACE_CACHE": str(folder / "cache"),
        "CUSTOM_KERNELS_CACHE": str(kernels),
        "UV_DEFAULT_INDEX": CLOSED,
        "PIP_INDEX_URL": CLOSED,
        "PIP_RETRIES": "0",
        "DEVICE": "cpu",
    }
    return Host(folder, env, origin / "host" / "bin" / "python")


@pytest.fixture
def host(packed: Path, tmp_path: Path) -> Host:
    """The machine with the bundle, on which nothing has run yet."""
    return host_with(packed, tmp_path / ODD)


@pytest.fixture(scope="module")
def placed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The machine after the bundle was unpacked; its Python has nothing that it had not before.
    Tests leave the checkout as they get it."""
    made = host_with(packed, tmp_path_factory.mktemp("placed") / ODD)
    site = made.python.parent.parent
    before = sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
    result = made.unbundle()
    assert result.returncode == 0, result.stdout
    assert sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts) == before
    return made


def assert_whole(host: Host) -> None:
    """The checkout works without a network, has the user's work, and nothing half made."""
    checkout = host.checkout
    doctor = subprocess.run(
        [*offline(), "make", "--no-print-directory", "doctor", "JSON=1"],
        cwd=checkout.root, env={**host.env, "ENV": "system"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads(doctor.stdout)["checks"]}
    assert doctor.returncode == 0, rows
    packed = json.loads((host.bundle / unbundle.MANIFEST).read_text())["packages"]
    # The tool chain comes along where this machine has no CUDA toolkit of its own.
    assert {one["name"] for one in packed} - {*TOOL_CHAIN} == LACKING
    assert f"{len(packed)} from bundle" in rows["packages"]["detail"]
    assert "1 local commits, 1 uncommitted" in rows["fork"]["detail"]
    assert (checkout.root / "mine.txt").read_text() == "not committed yet\n"
    assert (checkout.src / "vllm" / "kept.py").read_text() == "own = 'commit'\n"
    assert (checkout.src / "vllm" / "__init__.py").read_text() == "VALUE = 'my edit'\n"
    status = ["git", "status", "--porcelain"]
    said = subprocess.run(status, cwd=checkout.root, capture_output=True, text=True, check=True)
    assert said.stdout == "?? mine.txt\n"
    assert host.left() == []


def test_a_host_without_a_network_works_from_the_bundle(placed: Host) -> None:
    assert_whole(placed)
    own = placed.checkout.root / ".workspace" / "system" / "bin" / "python"
    query = "import rich, pydantic, torch, vllm; print(rich.__file__, vllm.VALUE)"
    said = subprocess.run([own, "-c", query], capture_output=True, text=True, check=True, cwd="/")
    path, _, edit = said.stdout.strip().partition(" ")
    assert Path(path).resolve().is_relative_to(placed.checkout.root / ".workspace" / "system")
    assert edit == "my edit"


def test_a_second_run_changes_nothing_and_keeps_what_was_edited_meanwhile(placed: Host) -> None:
    edited, added = placed.checkout.src / "vllm/__init__.py", placed.checkout.root / "kernels/note"
    before = edited.read_text()
    edited.write_text("VALUE = 'edited on the host'\n")
    added.write_text("mine\n")
    made = placed.checkout.make("unbundle", f"FROM={placed.bundle}")
    assert made.returncode == 0, made.stdout
    assert "is unpacked already" in made.stdout
    assert edited.read_text() == "VALUE = 'edited on the host'\n"
    assert added.read_text() == "mine\n"
    edited.write_text(before)
    added.unlink()


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_packages_come_back_where_the_environment_is_gone(placed: Host, installer: str) -> None:
    assert list((placed.folder / "cache").glob("*/uv-*.whl"))
    empty: dict[str, str] = {}
    if installer == "pip":
        if shutil.which("uv"):
            pytest.skip("the uv on PATH would be taken")
        empty = {"WORKSPACE_CACHE": str(placed.folder / "empty")}
    shutil.rmtree(placed.checkout.root / ".workspace" / "system")
    again = placed.checkout.make("dev", ENV="system", PYTHON=str(placed.python), **empty)
    assert again.returncode == 0, again.stdout
    assert_whole(placed)


def test_killed_at_any_point_a_second_run_goes_on(host: Host) -> None:
    for delay in (0.15, 0.4, 0.8, 1.5, 3, 6):
        process = host.start()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    result = host.unbundle()
    assert result.returncode == 0, result.stdout
    assert_whole(host)


def _missing(bundle: Path) -> None:
    (bundle / "part-0002").unlink()


def _damaged(bundle: Path) -> None:
    content = bytearray((bundle / "part-0003").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "part-0003").write_bytes(content)


def _truncated(bundle: Path) -> None:
    os.truncate(bundle / "part-0001", 1000)


def _of_another(bundle: Path) -> None:
    path = bundle / "part-0002"
    path.write_bytes(path.read_bytes().replace(b"bundle ", b"bundle f", 1)[: path.stat().st_size])


def _swapped(bundle: Path) -> None:
    shutil.copy(bundle / "part-0001", bundle / "part-0002")


def _one_too_many(bundle: Path) -> None:
    shutil.copy(bundle / "part-0001", bundle / "part-9999")


def _no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def _half_a_manifest(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 500)


FAULTS: dict[Callable[[Path], None], str] = {
    _missing: "parts are missing in .*part-0002",
    _damaged: "part-0003 is damaged",
    _truncated: "part-0001 has 1000 bytes, it should have",
    _of_another: "part-0002 is a part of another bundle",
    _swapped: "part-0002 is a part of another bundle, or another part",
    _one_too_many: "part-9999 is not of this bundle",
    _no_manifest: "there is no bundle in",
    _half_a_manifest: r"manifest\.json is damaged",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_bundle_that_is_not_whole_is_one_clear_line_and_leaves_nothing(
    host: Host, fault: Callable[[Path], None]
) -> None:
    fault(host.bundle)
    result = host.unbundle()
    assert result.returncode == 1
    errors = [line for line in result.stdout.splitlines() if not line.startswith("·")]
    assert len(errors) == 1, result.stdout
    assert errors[0].startswith("error: ")
    assert re.search(FAULTS[fault], errors[0]), errors
    assert sorted(path.name for path in host.folder.iterdir()) == ["bundle"]


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(host: Host) -> None:
    place = host.folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        result = host.unbundle("small/ws")
        assert result.returncode == 1
        assert "No space left on device" in result.stdout.splitlines()[-1]
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_python_of_another_version_is_refused(host: Host) -> None:
    other = next((p for v in load().python.supported if (p := shutil.which(f"python{v}"))
                  and not Path(sys.executable).name.endswith(v)
                  and f"{sys.version_info[0]}.{sys.version_info[1]}" != v
                  and subprocess.run([p, "-V"], capture_output=True, check=False).returncode == 0),
                 None)  # fmt: skip
    if other is None:
        pytest.skip("there is no other supported Python here")
    result = host.unbundle(PYTHON=other)
    assert result.returncode == 1
    assert "the bundle is for" in result.stdout
    assert not (host.checkout.root / ".workspace" / "bundle").exists()


def test_a_folder_that_is_not_a_checkout_is_left_alone(host: Host) -> None:
    (host.folder / "ws").mkdir()
    (host.folder / "ws" / "letter.txt").write_text("mine")
    result = host.unbundle()
    assert result.returncode == 1
    assert "is not a checkout" in result.stdout
    assert [path.name for path in (host.folder / "ws").iterdir()] == ["letter.txt"]


def test_edits_in_a_checkout_are_refused_before_anything_is_placed(host: Host) -> None:
    manifest = unbundle.read_manifest(host.bundle)
    unbundle.checkout(host.bundle, manifest, host.folder / "ws")
    (host.folder / "ws" / "pins.toml").open("a").write("# mine\n")
    result = host.unbundle()
    assert result.returncode == 1
    assert "pins.toml differs; it was not changed. Unpack beside it: python3" in result.stdout
    assert (host.folder / "ws" / "pins.toml").read_text().endswith("# mine\n")
    assert not (host.folder / "ws" / ".workspace" / "bundle").exists()
    assert not (host.folder / "ws" / "vllm-fork" / "releases" / VERSION).exists()


def test_work_in_a_tree_of_the_fork_is_refused_and_stays(host: Host) -> None:
    assert host.unbundle().returncode == 0
    shutil.rmtree(host.checkout.root / ".workspace" / "bundle")
    (host.checkout.src / "vllm" / "new.py").write_text("mine\n")
    result = host.unbundle()
    assert result.returncode == 1
    assert "holds work of yours" in result.stdout
    assert "mv vllm-fork/releases" in result.stdout
    assert (host.checkout.src / "vllm" / "new.py").read_text() == "mine\n"
    assert host.left() == []


def test_another_machine_is_refused(host: Host) -> None:
    manifest = json.loads((host.bundle / "manifest.json").read_text())
    manifest["target"]["machine"] = "riscv64"
    manifest["identity"] = unbundle.identity_of(manifest)
    (host.bundle / "manifest.json").write_text(json.dumps(manifest))
    result = host.unbundle()
    assert result.returncode == 1
    assert "the bundle is for riscv64" in result.stdout


def test_what_stops_the_packing_is_one_clear_line_and_leaves_no_half_bundle(
    ready_checkout: Checkout, tmp_path: Path
) -> None:
    path = tmp_path / "inventory.json"
    write_inventory(Path(sys.executable), path)
    target = f"TARGET={path}"
    elsewhere = {"WORKSPACE_CACHE": str(tmp_path), "UV_DEFAULT_INDEX": CLOSED}

    def refusal(*arguments: str, **env: str) -> str:
        result = ready_checkout.make("bundle", *arguments, **env)
        errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
        assert result.returncode != 0
        assert len(errors) == 1, result.stdout
        assert not list((ready_checkout.root / "bundle").glob("*"))
        return errors[0]

    assert "name the host's inventory: make bundle TARGET=<file>" in refusal()
    assert "No such file" in refusal("TARGET=nowhere.json")
    assert "PARTS=huge is not a size" in refusal(target, "PARTS=huge")
    assert "is not a git repository" in refusal(target)
    subprocess.run(["git", "init", "-q"], cwd=ready_checkout.root, check=True)
    try:
        assert "could not be fetched" in refusal(target, **elsewhere)
        taken = json.loads(path.read_text())
        taken["python"]["short"] = "3.9"
        path.write_text(json.dumps(taken))
        assert "no bundle for that host" in refusal(target)
    finally:
        shutil.rmtree(ready_checkout.root / ".git")
