# SPDX-License-Identifier: Apache-2.0
"""Create the environment of a vLLM release and install its lock; skipped when nothing changed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from workspace.environment import conda, index, uv
from workspace.environment.commands import INDEX_REMEDY, run
from workspace.environment.device import device
from workspace.environment.python import find_python, version_of
from workspace.host import settings
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.paths import MACHINE, ROOT, cache_folder, lock_files
from workspace.host.text import say
from workspace.pins import release

OWN_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
HOSTS_PACKAGES = (
    "import site; user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []; "
    "print(*user, *site.getsitepackages(), sep='\\n')"
)
"""All folders in which a Python looks for packages, in its order: its user's own, too, and on
Debian those of the distribution's packages. The inventory counts what is in any of them."""


def _unfinished(prefix: Path) -> Path:
    """The mark of an environment that is being made: what a kill left half done is redone."""
    MACHINE.mkdir(parents=True, exist_ok=True)
    return MACHINE / f"installing{prefix.name}"


def _uv_environment(prefix: Path, python: str, files: list[Path]) -> None:
    """Create `prefix` and install the locks."""
    binary = uv.obtain(python, release.pins())
    interrupted = _unfinished(prefix).exists()
    own = prefix / "bin" / "python"
    another = own.exists() and version_of(str(own)) != version_of(python)
    _unfinished(prefix).touch()
    if interrupted or another or not own.exists():
        say(f"creating {prefix.name} with {python}")
        keep = "--clear" if another else "--allow-existing"
        run([str(binary), "venv", "-q", keep, "--python", python, str(prefix)])
    _install_locks(own, binary, files, again=interrupted)
    _unfinished(prefix).unlink()


def _conda_environment(prefix: Path, specs: list[str], files: list[Path]) -> None:
    """Create `prefix` from conda-forge, anew where the pins changed, and install the locks."""
    own, again = prefix / "bin" / "python", _unfinished(prefix).exists()
    if not conda.complete(prefix, specs):
        tool = conda.tool()
        if prefix.exists() and not again and not (prefix / "workspace.json").exists():
            raise WorkspaceError(
                f"{prefix} is there, but this workspace did not make it; move it away and run: "
                "make dev ENV=conda"
            )
        _unfinished(prefix).touch()
        shutil.rmtree(prefix, ignore_errors=True)
        say(f"creating {prefix.name} with {Path(tool).name}: {', '.join(specs)}")
        failure = (
            f"{Path(tool).name} could not make {prefix.name} (its output is above); check the "
            f"network, free disk space and its channel {conda.CHANNEL}, then re-run"
        )
        run(conda.create_command(tool, prefix, specs), failure=failure)
        again = False
    _unfinished(prefix).touch()
    _install_locks(own, uv.obtain(str(own), release.pins()), files, again=again)
    _unfinished(prefix).unlink()


def _install_locks(python: Path, binary: Path, files: list[Path], *, again: bool) -> None:
    """Install exactly what the locks say into the environment of `python`."""
    say("installing the locked packages (about 4 GB to fetch on the first run)")
    command = [str(binary), "pip", "install", "--python", str(python)]
    command += ["--require-hashes", "--no-deps"]
    # With a terminal uv draws its progress; in a log its list of 250 packages is noise.
    command += [] if sys.stderr.isatty() else ["-q"]
    command += ["--reinstall"] if again else []
    for path in files:
        command += ["-r", str(path)]
    failure = f"the locked packages could not be installed (uv's output is above); {INDEX_REMEDY}"
    run(command, env=index.uv_environment(), failure=failure)


def _system_environment(prefix: Path, python: str, pins: dict, bundled: list[Path]) -> None:
    """An overlay over the host's own interpreter: its packages are seen, and what a bundle brought
    goes before them. Nothing is installed into the host's own.

    A venv's --system-site-packages shows the packages of the base interpreter, which is not
    the given one where that is a venv itself; so its folders are named in a .pth file.
    """
    say(f"using the packages of {python}; nothing is installed into it")
    run([python, "-m", "venv", "--without-pip", "--clear", str(prefix)], quiet=True)
    own = run([str(prefix / "bin" / "python"), "-c", OWN_PACKAGES], quiet=True).splitlines()[0]
    host = run([python, "-c", HOSTS_PACKAGES], quiet=True).splitlines()
    # Escaped: which encoding such a file is read in depends on Python and locale.
    lines = [f"import site; site.addsitedir({folder!a})" for folder in host]
    (Path(own) / "host.pth").write_text("\n".join(lines) + "\n")
    for requirements in bundled:
        say(f"installing the bundle's packages into {prefix.name}")
        run(
            [*_bundle_installer(prefix, python, pins), "--no-index", "--no-deps",
             "--require-hashes", "--find-links", str(requirements.parent / "wheels"),
             "-r", str(requirements)],
            quiet=True,
            failure="the bundle's packages could not be installed; run: make unbundle FROM=<it>",
        )  # fmt: skip


def _bundle_installer(prefix: Path, python: str, pins: dict) -> list[str]:
    """uv of the bundle, else the host's uv or pip; the bundle has one where the host has none."""
    own, installer = str(prefix / "bin" / "python"), shutil.which("uv")
    sha256 = pins["uv"]["sha256"].get(platform.machine(), "")
    if (cache_folder(sha256) / uv.wheel_name(pins["uv"]["version"])).exists():
        installer = str(uv.obtain(python, pins))
    if installer:
        return [installer, "pip", "install", "-q", "--offline", "--python", own]
    # pip would leave out what the host has, though the bundle has another version on purpose.
    return [own, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--ignore-installed"]


def ready(mode: str, version: str) -> Path | None:
    """The interpreter of a release's environment as it is; None where none was made."""
    prefix = release.environment(mode, version)
    return prefix / "bin" / "python" if (prefix / "workspace.json").exists() else None


def any_ready(mode: str) -> Path | None:
    """The interpreter of the first release that has an environment."""
    return next(filter(None, (ready(mode, one) for one in release.pins()["vllm"]["release"])), None)


def ensure(mode: str, version: str) -> Path:
    """The interpreter of an environment that matches the release's lock, made or updated if need
    be."""
    prefix = release.environment(mode, version)
    own = prefix / "bin" / "python"
    pins = release.pins()
    if mode == "system":
        files = list(release.bundled(version).glob("requirements.txt"))
    else:
        files = lock_files(version, device())
    digest = hashlib.sha256()
    for path in files:
        if not path.exists():
            raise WorkspaceError(
                f"{path} is missing; run: git checkout {path.relative_to(ROOT)}, or make lock"
            )
        digest.update(path.read_bytes())
    wanted: dict[str, Any] = {"lock": digest.hexdigest()}
    if mode == "conda":
        wanted["conda"] = conda.specs(pins, version)
        if settings.current().python:
            raise WorkspaceError(
                f"ENV=conda brings its own Python, {pins['conda']['python']}; leave PYTHON= out"
            )
    elif settings.current().python:
        wanted["python"] = find_python()
    stamp = prefix / "workspace.json"
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    # Without PYTHON= the interpreter of an earlier run stays.
    if own.exists() and made and {**made, **wanted} == made:
        return own
    if mode == "conda":
        _conda_environment(prefix, wanted["conda"], files)
    else:
        kept = own.exists() and made.get("python")
        wanted["python"] = wanted.get("python") or kept or find_python()
        if mode == "uv":
            _uv_environment(prefix, wanted["python"], files)
        else:
            _system_environment(prefix, wanted["python"], pins, files)
    write_file(stamp, json.dumps(wanted).encode())
    return own
