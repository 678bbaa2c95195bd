# SPDX-License-Identifier: Apache-2.0
"""From any Python 3 to the workspace's environment, then on to the verb.

    python3 workspace/bootstrap.py VERB [ARGUMENT ...]

Steps, each skipped when its inputs have not changed: choose an interpreter, fetch uv at its
pinned version, create the environment, install the lock into it, and replace this process by
`python -m workspace VERB` of that environment.

Standard library only, and the first lines run on any Python 3: nothing is installed yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workspace import conda, git, index, plain_path, release  # noqa: E402
from workspace.errors import WorkspaceError, told_in_one_line  # noqa: E402
from workspace.files import write_file  # noqa: E402
from workspace.paths import MACHINE, PINS, STATE, cache_folder, lock_path  # noqa: E402

TOOLS = MACHINE / "tools"
MODES = ("uv", "conda", "system")
ON_THE_HOST = {
    "image": "image",
    "devcontainer": "before",
    "container": "start",
    "shell": "shell",
    "snapshot": "snapshot",
    "snapshots": "snapshots",
    "snapshot-verify": "verify",
}
"""Verbs that work on containers → their module. They need Docker's client and no environment."""
LOCK_VARIABLE = "WORKSPACE_LOCK_FD"
UNWANTED = (
    # Every start of vLLM would compile thousands of modules anew: 20 s on 2 cores.
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONSAFEPATH",  # `python -m workspace` finds the package in the current folder
    "TAR_OPTIONS",
)
"""Variables of the user's under which what we start would fail or do something else."""
OWN_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
HOSTS_PACKAGES = (
    "import site; user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []; "
    "print(*user, *site.getsitepackages(), sep='\\n')"
)
"""All folders in which a Python looks for packages, in its order: its user's own, too, and on
Debian those of the distribution's packages. The inventory counts what is in any of them."""
INDEX_REMEDY = (
    "check the network and free disk space, or point UV_DEFAULT_INDEX (or pip's index-url) to "
    "another index, and run the same command again"
)


def say(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)


def run(
    command: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    quiet: bool = False,
    failure: str = "",
) -> str:
    """Run a command that must succeed.

    `failure` says in one line what could not be done and what to do about it; the error ends with
    the command's last line of complaint, unless that was shown already (not `quiet`).

    The set-up lock is passed on: where this process is killed and the command lives on, the
    next run waits for it instead of writing to the same files.
    """
    descriptor = os.environ.get(LOCK_VARIABLE)
    result = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE if quiet else sys.stderr,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        pass_fds=[int(descriptor)] if descriptor else [],
        check=False,
    )
    if result.returncode:
        complaint = [line for line in (result.stderr or "").splitlines() if line.strip()]
        reason = complaint[-1].strip() if complaint else f"exit status {result.returncode}"
        what = failure or f"{' '.join(command[:4])} … failed"
        raise WorkspaceError(f"{what}: {index.hide(reason)}" if complaint or not failure else what)
    return result.stdout or ""


# --- the interpreter ------------------------------------------------------------------------


def version_of(python: str) -> str | None:
    """'3.12' for an interpreter that really runs, else None (a pyenv shim may not)."""
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            [python, "-c", probe], capture_output=True, text=True, timeout=30, check=False
        )
        if result.returncode == 0:
            return result.stdout.strip()
    return None


def supported_versions() -> list[str]:
    """The versions in pins.toml, preferred first. Read without tomllib, which 3.10 lacks."""
    for line in PINS.read_text().splitlines():
        if line.startswith("supported = ["):
            return json.loads(line.split("=", 1)[1].split("#")[0])
    raise WorkspaceError(f"{PINS} names no supported Python; run: git checkout pins.toml")


def find_python() -> str:
    """PYTHON= if given, else the most preferred supported version on PATH or under pyenv."""
    supported = supported_versions()
    asked = os.environ.get("PYTHON")
    if asked:
        path = shutil.which(asked)
        version = version_of(path) if path else None
        if path is None or version not in supported:
            raise WorkspaceError(
                f"PYTHON={asked} is "
                + (f"Python {version}" if version else "not a Python that runs")
                + f"; give one of Python {', '.join(sorted(supported))}"
            )
        return path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in supported:
        found = [shutil.which(f"python{version}"), shutil.which("python3"), sys.executable]
        found += [str(p / "bin" / "python") for p in sorted(pyenv.glob(f"{version}.*"))]
        for candidate in found:
            if candidate and version_of(candidate) == version:
                return candidate
    raise WorkspaceError(
        f"no Python {', '.join(sorted(supported))} found (this is {platform.python_version()}); "
        "install one, on Debian and Ubuntu: apt-get install python3, or give PYTHON=<path>"
    )


# --- uv -------------------------------------------------------------------------------------


def distribution_package(package: str, why: str) -> Path:
    """A folder with the files of a Debian or Ubuntu package, in our tools; nothing is installed.

    apt works here without root because lists and cache are kept in our own folder.

    Raises:
        WorkspaceError: no apt, or apt cannot get the package; says what to install.
    """
    folder = TOOLS / package
    if folder.exists():
        return folder
    remedy = f"{why}; install your distribution's {package} (Debian, Ubuntu: apt-get install it)"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise WorkspaceError(remedy)
    say(f"{why}: unpacking the distribution's {package} (nothing is installed)")
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS, prefix="apt-") as work:
        for name in ("lists/partial", "cache/archives/partial", "files"):
            (Path(work) / name).mkdir(parents=True)
        apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={work}/lists"]
        apt += ["-o", f"Dir::Cache={work}/cache", "-o", "APT::Sandbox::User="]
        run([*apt, "update"], quiet=True, failure=remedy)
        run([*apt, "download", package], quiet=True, cwd=work, failure=remedy)
        (archive,) = Path(work).glob("*.deb")
        run(["dpkg-deb", "-x", str(archive), f"{work}/files"], quiet=True)
        (Path(work) / "files").replace(folder)
    return folder


def _pip_command(python: str) -> list[str]:
    has_pip = subprocess.run([python, "-c", "import pip"], capture_output=True, check=False)
    if has_pip.returncode == 0:
        return [python, "-m", "pip"]
    # The bare python3 of Debian and Ubuntu has neither pip nor ensurepip; their venv has.
    why = "this Python has no pip, which is needed once to fetch uv"
    folder = distribution_package("python3-pip-whl", why)
    (wheel,) = folder.glob("usr/share/python-wheels/pip-*.whl")
    return [python, str(wheel / "pip")]


def uv_wheel_name(version: str) -> str:
    """Its name in the cache."""
    return f"uv-{version}.whl"


def _fetch_uv(python: str, version: str, sha256: str) -> Path:
    """The wheel of uv, from the cache or through pip (and so the user's index settings)."""
    folder = cache_folder(sha256)
    cached = folder / uv_wheel_name(version)
    if cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == sha256:
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        requirement = Path(work) / "uv.txt"
        requirement.write_text(f"uv=={version} --hash=sha256:{sha256}\n")
        say(f"fetching uv {version}")
        run(
            [*_pip_command(python), "download", "-q", "--no-deps", "--only-binary=:all:",
             "--require-hashes", "-r", str(requirement), "-d", work],
            quiet=True,
            failure=f"uv {version} could not be fetched; {INDEX_REMEDY}",
        )  # fmt: skip
        (wheel,) = Path(work).glob("*.whl")
        wheel.replace(cached)
    return cached


def uv_binary(version: str) -> Path:
    return TOOLS / f"uv-{version}" / "uv"


def uv_sha256(pins: dict, machine: str) -> str:
    """Of the wheel of the pinned uv.

    Raises:
        WorkspaceError: none is pinned for that machine.
    """
    if machine not in pins["uv"]["sha256"]:
        raise WorkspaceError(f"pins.toml has no uv for {machine}; add its sha256 under [uv]")
    return str(pins["uv"]["sha256"][machine])


def obtain_uv(python: str, pins: dict) -> Path:
    """The pinned uv, in the checkout's own tools."""
    version = pins["uv"]["version"]
    binary = uv_binary(version)
    if binary.exists():
        return binary
    sha256 = uv_sha256(pins, platform.machine())
    with zipfile.ZipFile(_fetch_uv(python, version, sha256)) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
        write_file(binary, archive.read(member), mode=0o755)
    return binary


# --- the environment ------------------------------------------------------------------------


def lock_files(version: str, device: str) -> list[Path]:
    """The locks of a vLLM release that an environment for `device` is made from."""
    files = [lock_path(version)]
    return [*files, lock_path(version, gpu=True)] if device == "cuda" else files


def device() -> str:
    """DEVICE= if given, else cuda where the NVIDIA driver (or WSL's) made a GPU device."""
    asked = os.environ.get("DEVICE")
    if asked in ("cuda", "cpu"):
        return asked
    if asked:
        raise WorkspaceError(f"DEVICE={asked} is not known; give DEVICE=cuda or DEVICE=cpu")
    # A look at the device files, because asking nvidia-smi can take seconds.
    found = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return "cuda" if found else "cpu"


def _unfinished(prefix: Path) -> Path:
    """The mark of an environment that is being made: what a kill left half done is redone."""
    MACHINE.mkdir(parents=True, exist_ok=True)
    return MACHINE / f"installing{prefix.name}"


def _uv_environment(prefix: Path, python: str, files: list[Path]) -> None:
    """Create `prefix` and install the locks."""
    uv = obtain_uv(python, release.pins())
    interrupted = _unfinished(prefix).exists()
    own = prefix / "bin" / "python"
    another = own.exists() and version_of(str(own)) != version_of(python)
    _unfinished(prefix).touch()
    if interrupted or another or not own.exists():
        say(f"creating {prefix.name} with {python}")
        keep = "--clear" if another else "--allow-existing"
        run([str(uv), "venv", "-q", keep, "--python", python, str(prefix)])
    _install_locks(own, uv, files, again=interrupted)
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
            f"{Path(tool).name} could not make {prefix.name} (it says why above); check the "
            f"network, free disk space and where its {conda.CHANNEL} lies, and run the same again"
        )
        run(conda.create_command(tool, prefix, specs), failure=failure)
        again = False
    _unfinished(prefix).touch()
    _install_locks(own, obtain_uv(str(own), release.pins()), files, again=again)
    _unfinished(prefix).unlink()


def _install_locks(python: Path, uv: Path, files: list[Path], *, again: bool) -> None:
    """Install exactly what the locks say into the environment of `python`."""
    say("installing the locked packages (about 4 GB to fetch on the first run)")
    command = [str(uv), "pip", "install", "--python", str(python), "--require-hashes", "--no-deps"]
    # With a terminal uv draws its progress; in a log its list of 250 packages is noise.
    command += [] if sys.stderr.isatty() else ["-q"]
    command += ["--reinstall"] if again else []
    for path in files:
        command += ["-r", str(path)]
    failure = f"the locked packages could not be installed (uv says why above); {INDEX_REMEDY}"
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
    own, uv = str(prefix / "bin" / "python"), shutil.which("uv")
    sha256 = pins["uv"]["sha256"].get(platform.machine(), "")
    if (cache_folder(sha256) / uv_wheel_name(pins["uv"]["version"])).exists():
        uv = str(obtain_uv(python, pins))
    if uv:
        return [uv, "pip", "install", "-q", "--offline", "--python", own]
    # pip would leave out what the host has, though the bundle has another version on purpose.
    return [own, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--ignore-installed"]


def ensure_environment(mode: str, version: str) -> Path:
    """The interpreter of an environment that matches the release's lock, made or mended if need
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
        if os.environ.get("PYTHON"):
            raise WorkspaceError(
                f"ENV=conda brings its own Python, {pins['conda']['python']}; leave PYTHON= out"
            )
    elif os.environ.get("PYTHON"):
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


# --- one set-up at a time -------------------------------------------------------------------


def take_lock(verb: str) -> None:
    """Hold the checkout's set-up lock; the verb lets go of it when its set-up is done.

    The lock belongs to the open file, so it ends with the last process that holds it, however
    that process ends.
    """
    STATE.mkdir(exist_ok=True)
    descriptor = os.open(STATE / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        say(f"waiting: another make is at work in this checkout ({holder or 'unknown'})")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.geteuid() == 0:  # under sudo it stays the owner's, who takes it next
        os.fchown(descriptor, ROOT.stat().st_uid, ROOT.stat().st_gid)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"make {verb}, process {os.getpid()}".encode(), 0)
    os.set_inheritable(descriptor, True)
    os.environ[LOCK_VARIABLE] = str(descriptor)


def doctor_without_environment(arguments: list[str]) -> int:
    """The doctor's answer in a checkout that has no environment to ask more in."""
    if "--json" in arguments or os.environ.get("JSON") == "1":
        check = {"name": "environment", "status": "missing", "remedy": "make dev"}
        print(json.dumps({"usable": False, "checks": [check]}))
    else:
        print("environment: not set up; run: make dev")
    return 1


def _release_for(verb: str) -> str:
    """The release that a verb works on.

    Raises:
        WorkspaceError: it is not pinned, or a rebase to it is not done.
    """
    from workspace import rebase_state

    rebase = rebase_state.read()
    if rebase and verb == "fork-rebase":
        return rebase.origin
    version = release.selected()
    if rebase and version == rebase.target:
        raise WorkspaceError(f"a rebase is under way {rebase_state.summary()}")
    release.require_pinned(version)
    return version


def _any_environment(mode: str, verb: str) -> Path | None:
    """An interpreter that is there, for verbs that work on trees only: they need no other
    release's gigabytes."""
    if verb not in ("fork-export", "fork-rebase"):
        return None
    made = (release.environment(mode, one) for one in release.pins()["vllm"]["release"])
    ready = (prefix for prefix in made if (prefix / "workspace.json").exists())
    return next((prefix / "bin" / "python" for prefix in ready), None)


def main(arguments: list[str]) -> int:
    """Set up the environment and become the verb."""
    git.forget_surroundings()
    for name in UNWANTED:
        os.environ.pop(name, None)
    verb = arguments[0] if arguments else "help"
    mode = os.environ.get("ENV") or "uv"
    plain_path.require_usable(ROOT)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs on the system's Python
        # tomllib and the workspace need 3.11; go on in an interpreter that has it.
        python = find_python()
        os.execv(python, [python, __file__, *arguments])
    if mode not in MODES:
        raise WorkspaceError(f"ENV={mode} is not known; give ENV=uv, ENV=conda or ENV=system")
    if verb == "clean":
        # It removes the environment, so it cannot run in it.
        take_lock(verb)
        from workspace import clean

        return clean.run(force=os.environ.get("FORCE") == "1")
    if verb == "fork-status":
        from workspace import fork_status

        return fork_status.run(as_json=os.environ.get("JSON") == "1")
    if verb == "fork-diff":
        from workspace import fork_diff

        return fork_diff.run(own=os.environ.get("OWN") == "1", stat=os.environ.get("STAT") == "1")
    if verb in ON_THE_HOST:
        return importlib.import_module(f"workspace.container.{ON_THE_HOST[verb]}").run()
    if verb == "inventory":
        # With the interpreter that is asked about: the file needs no other.
        python = shutil.which(os.environ.get("PYTHON") or "python3") or sys.executable
        os.execv(python, [python, str(ROOT / "workspace" / "inventory.py"), "inventory.json"])
    unbundling = verb == "unbundle"
    if unbundling:
        take_lock(verb)
        from workspace import placing

        os.environ.update(placing.run(os.environ.get("FROM") or ""))
        verb, mode, arguments = "dev", "system", ["dev"]
    version = _release_for(verb)
    if verb == "doctor":
        # It only looks: no lock, and nothing is set up.
        prefix = release.environment(mode, version)
        if not (prefix / "workspace.json").exists():
            return doctor_without_environment(arguments[1:])
        interpreter = prefix / "bin" / "python"
    else:
        if not unbundling:
            take_lock(verb)
        if verb == "dev":
            from workspace import fork_tree

            fork_tree.require_switchable(version)
        interpreter = _any_environment(mode, verb) or ensure_environment(mode, version)
    os.environ["ENV"] = mode
    os.environ[release.SELECTED] = version
    os.environ.pop(release.ASKED, None)
    # By names that the tools which it starts can take; its own stays in what is installed.
    folder = interpreter.parents[1]
    interpreter = plain_path.plain(folder.parent) / folder.name / "bin" / "python"
    os.environ.update(plain_path.variables())
    # Tools that start other tools (pre-commit, torch's inductor, ninja) find the pinned ones.
    os.environ["PATH"] = os.pathsep.join([str(interpreter.parent), os.environ.get("PATH", "")])
    if mode == "conda":
        # conda's Python is no venv: the user's own site-packages would go before the locked ones.
        os.environ["PYTHONNOUSERSITE"] = "1"
    # `-m` finds the package in the current folder, so nothing is put on PYTHONPATH: there, our
    # folder `kernels/` could pass for the package of that name in every process.
    os.chdir(ROOT)
    os.execv(interpreter, [str(interpreter), "-m", "workspace", *arguments])


if __name__ == "__main__":
    with told_in_one_line(STATE):
        sys.exit(main(sys.argv[1:]))
