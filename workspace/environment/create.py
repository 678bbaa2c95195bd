# SPDX-License-Identifier: Apache-2.0
"""Create the environment of a vLLM release and install its lock, unless nothing changed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import TypedDict

from workspace.environment import conda, host_packages, index, uv
from workspace.environment.commands import INDEX_REMEDY, run
from workspace.environment.python import find_python, version_of
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import MACHINE, ROOT, lock_files
from workspace.host.text import say
from workspace.pins import release

PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
SITE_FOLDERS = (
    "import site; user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []; "
    "print(*user, *site.getsitepackages(), sep='\\n')"
)
"""Prints all folders in which a Python looks for packages, in its order: of the user, of the
interpreter, and on Debian of the distribution. The inventory lists packages of all of them."""


class Stamp(TypedDict, total=False):
    """What an environment was made from, in its workspace.json."""

    lock: str
    conda: list[str]
    python: str


def _interpreter(prefix: Path) -> Path:
    return prefix / "bin" / "python"


def _unfinished(prefix: Path) -> Path:
    """Exists while an environment is being made: after a kill, packages are installed again."""
    MACHINE.mkdir(parents=True, exist_ok=True)
    return MACHINE / f"installing{prefix.name}"


def _uv_environment(prefix: Path, python: str, locks: list[Path]) -> None:
    """Create `prefix` and install the locks."""
    binary, interpreter = uv.obtain(python), _interpreter(prefix)
    interrupted = _unfinished(prefix).exists()
    replaced = interpreter.exists() and version_of(str(interpreter)) != version_of(python)
    _unfinished(prefix).touch()
    if interrupted or replaced or not interpreter.exists():
        say(f"creating {prefix.name} with {python}")
        existing = "--clear" if replaced else "--allow-existing"
        run([str(binary), "venv", "-q", existing, "--python", python, str(prefix)])
    _install_locks(interpreter, locks, reinstall=interrupted)
    _unfinished(prefix).unlink()


def _conda_environment(prefix: Path, specs: list[str], locks: list[Path]) -> None:
    """Create `prefix` from conda-forge, again if the pins changed, and install the locks."""
    interrupted = _unfinished(prefix).exists()
    complete = {f"{name}=={number}" for name, number in conda.installed(prefix).items()}
    if not complete.issuperset(specs):
        tool = conda.tool()
        if prefix.exists() and not interrupted and not (prefix / "workspace.json").exists():
            raise release.foreign(prefix, "make dev ENV=conda")
        _unfinished(prefix).touch()
        shutil.rmtree(prefix, ignore_errors=True)
        say(f"creating {prefix.name} with {Path(tool).name}: {', '.join(specs)}")
        failure = (
            f"{Path(tool).name} could not create {prefix.name} (its output is above); check the "
            f"network, free disk space and its channel {conda.CHANNEL}, then re-run"
        )
        run(conda.create_command(tool, prefix, specs), failure=failure)
        interrupted = False
    _unfinished(prefix).touch()
    _install_locks(_interpreter(prefix), locks, reinstall=interrupted)
    _unfinished(prefix).unlink()


def packages_only(prefix: Path, mode: str, version: str) -> Path:
    """A new environment of a release at `prefix`, with the locked packages, or for ENV=system over
    the host's and a bundle's: neither vLLM nor the kernels are installed. Its interpreter.

    Raises:
        WorkspaceError: no fitting Python, or packages cannot be fetched.
    """
    shutil.rmtree(prefix, ignore_errors=True)
    python = settings.current().python or find_python()
    if mode == "system":
        bundled = list(release.bundled(version).glob("requirements.txt"))
        _system_environment(prefix, python, bundled)
    else:
        _uv_environment(prefix, python, lock_files(version, settings.device()))
    return _interpreter(prefix)


def _install_locks(python: Path, locks: list[Path], *, reinstall: bool) -> None:
    """Install exactly the locked packages into the environment of `python`."""
    say("installing the locked packages (about 4 GB to fetch on the first run)")
    command = [str(uv.obtain(str(python))), "pip", "install", "--python", str(python)]
    command += ["--require-hashes", "--no-deps"]
    # On a terminal uv draws its progress; in a log its list of 250 packages is noise.
    command += [] if sys.stderr.isatty() else ["-q"]
    command += ["--reinstall"] if reinstall else []
    for path in locks:
        command += ["-r", str(path)]
    failure = f"the locked packages could not be installed (uv's output is above); {INDEX_REMEDY}"
    run(command, env=index.uv_environment(), failure=failure)


def _system_environment(prefix: Path, python: str, bundled: list[Path]) -> None:
    """An overlay on the host's interpreter: it sees the host's packages, after those of a bundle.
    Nothing is installed into the host's interpreter.

    --system-site-packages would show the packages of the base interpreter, which is another one if
    the host's is a venv itself; so its folders are named in a .pth file. With a torch in the bundle
    they are folders of links (host_packages.py).
    """
    say(f"using the packages of {python}; nothing is installed into it")
    run([python, "-m", "venv", "--without-pip", "--clear", str(prefix)], quiet=True)
    purelib = run([str(_interpreter(prefix)), "-c", PURELIB], quiet=True).splitlines()[0]
    host = [Path(line) for line in run([python, "-c", SITE_FOLDERS], quiet=True).splitlines()]
    _let_see(Path(purelib), host)  # the host's pip may install what follows
    for requirements in bundled:
        say(f"installing the bundle's packages into {prefix.name}")
        run(
            [*_bundle_installer(_interpreter(prefix), python), "--no-index", "--no-deps",
             "--require-hashes", "--find-links", str(requirements.parent / "wheels"),
             "-r", str(requirements)],
            quiet=True,
            failure="the bundle's packages could not be installed; run: make unbundle FROM=<it>",
        )  # fmt: skip
    if host_packages.has_torch(bundled):
        _let_see(Path(purelib), host_packages.show(prefix, Path(purelib), host, bundled))
        host_packages.require_one_torch(_interpreter(prefix), python)


def _let_see(purelib: Path, folders: list[Path]) -> None:
    # Escaped: the encoding in which such a file is read depends on Python and locale.
    lines = [f"import site; site.addsitedir({str(folder)!a})" for folder in folders]
    (purelib / "host.pth").write_text("\n".join(lines) + "\n")


def _bundle_installer(interpreter: Path, python: str) -> list[str]:
    """uv from the bundle, which has it if the host has no installer; else the host's uv or pip."""
    installer = shutil.which("uv")
    if uv.cached_wheel(release.pins()["uv"]["sha256"].get(platform.machine(), "")).exists():
        installer = str(uv.obtain(python))
    if installer:
        return [installer, "pip", "install", "-q", "--offline", "--python", str(interpreter)]
    # Without --ignore-installed pip would skip packages of which the host has another version.
    pip = [str(interpreter), "-m", "pip", "install", "-q"]
    return [*pip, "--disable-pip-version-check", "--ignore-installed"]


def existing(mode: str, version: str) -> Path | None:
    """The interpreter of a release's environment, even if outdated; None without an environment."""
    prefix = release.environment(mode, version)
    return _interpreter(prefix) if (prefix / "workspace.json").exists() else None


def ensure(mode: str, version: str) -> Path:
    """The interpreter of the release's environment, which is created or updated if needed.

    Raises:
        WorkspaceError: a lock is missing, no fitting Python, or packages cannot be fetched.
    """
    prefix = release.environment(mode, version)
    interpreter, python = _interpreter(prefix), settings.current().python
    if mode == "system":
        locks = list(release.bundled(version).glob("requirements.txt"))
    else:
        locks = lock_files(version, settings.device())
    digest = hashlib.sha256()
    for path in locks:
        if not path.exists():
            raise WorkspaceError(
                f"{path} is missing; run: git checkout {path.relative_to(ROOT)}, or make lock"
            )
        digest.update(path.read_bytes())
    wanted: Stamp = {"lock": digest.hexdigest()}
    if mode == "conda":
        wanted["conda"] = conda.specs(version)
        if python:
            number = release.pins()["conda"]["python"]
            raise WorkspaceError(f"ENV=conda installs its own Python, {number}; leave PYTHON= out")
    elif python:
        wanted["python"] = find_python()
    stamp = prefix / "workspace.json"
    before: Stamp = json.loads(stamp.read_text()) if stamp.exists() else {}
    # Without PYTHON= the interpreter of an earlier run stays.
    if interpreter.exists() and before and {**before, **wanted} == before:
        return interpreter
    if mode == "conda":
        _conda_environment(prefix, wanted["conda"], locks)
    else:
        kept = before.get("python") if interpreter.exists() else None
        wanted["python"] = wanted.get("python") or kept or find_python()
        create = _uv_environment if mode == "uv" else _system_environment
        create(prefix, wanted["python"], locks)
    write_file(stamp, json.dumps(wanted).encode())
    return interpreter
