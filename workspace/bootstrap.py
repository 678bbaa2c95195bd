# SPDX-License-Identifier: Apache-2.0
"""From any Python 3 to the workspace's environment, then on to the verb.

    python3 workspace/bootstrap.py VERB [ARGUMENT ...]

Steps, each skipped when its inputs have not changed: choose an interpreter, fetch uv at its
pinned version, create the environment, install the lock into it, and replace this process by
`python -m workspace VERB` of that environment.

Standard library only, and the first lines run on any Python 3: nothing is installed yet.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workspace.host import git, plain_path, setup_lock  # noqa: E402
from workspace.host.errors import WorkspaceError, told_in_one_line  # noqa: E402
from workspace.host.paths import STATE  # noqa: E402
from workspace.pins import release  # noqa: E402

MODES = ("uv", "conda", "system")
ON_THE_HOST = {
    "image": "image",
    "devcontainer": "initialize",
    "container": "start",
    "shell": "shell",
    "snapshot": "snapshot",
    "snapshots": "snapshots",
    "snapshot-verify": "verify",
}
"""Verbs that work on containers → their module. They need Docker's client and no environment."""
UNWANTED = (
    # Every start of vLLM would compile thousands of modules anew: 20 s on 2 cores.
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONSAFEPATH",  # `python -m workspace` finds the package in the current folder
    "TAR_OPTIONS",
)
"""Variables of the user's under which what we start would fail or do something else."""


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
    from workspace.fork import rebase_state

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
        from workspace.environment.python import find_python

        python = find_python()
        os.execv(python, [python, __file__, *arguments])
    if mode not in MODES:
        raise WorkspaceError(f"ENV={mode} is not known; give ENV=uv, ENV=conda or ENV=system")
    if verb == "clean":
        # It removes the environment, so it cannot run in it.
        setup_lock.take(verb)
        from workspace import clean

        return clean.run(force=os.environ.get("FORCE") == "1")
    if verb == "fork-status":
        from workspace.fork import status

        return status.run(as_json=os.environ.get("JSON") == "1")
    if verb == "fork-diff":
        from workspace.fork import diff

        return diff.run(own=os.environ.get("OWN") == "1", stat=os.environ.get("STAT") == "1")
    if verb in ON_THE_HOST:
        return importlib.import_module(f"workspace.container.{ON_THE_HOST[verb]}").run()
    if verb == "inventory":
        # With the interpreter that is asked about: the file needs no other.
        python = shutil.which(os.environ.get("PYTHON") or "python3") or sys.executable
        script = ROOT / "workspace" / "environment" / "inventory.py"
        os.execv(python, [python, str(script), "inventory.json"])
    unbundling = verb == "unbundle"
    if unbundling:
        setup_lock.take(verb)
        from workspace.bundle import place

        os.environ.update(place.run(os.environ.get("FROM") or ""))
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
            setup_lock.take(verb)
        if verb == "dev":
            from workspace.fork import tree_state

            tree_state.require_switchable(version)
        from workspace.environment import create

        interpreter = _any_environment(mode, verb) or create.ensure(mode, version)
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
