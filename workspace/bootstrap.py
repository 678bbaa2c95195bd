# SPDX-License-Identifier: Apache-2.0
"""From any Python 3 to the environment of the workspace, then to the verb.

    python3 workspace/bootstrap.py VERB

Verbs that need no environment run here. For the others, each step is skipped if its inputs have not
changed: choose an interpreter, fetch uv at its pinned version, create the environment, install the
lock into it, and replace this process by `python -m workspace VERB` in that environment.

Standard library only, and the first lines run on any Python 3: nothing is installed yet.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# On a full disk Python before 3.12.8 leaves half a .pyc file, with which no later run starts.
FULL = shutil.disk_usage(ROOT).free < 64 << 20
sys.dont_write_bytecode = FULL

from workspace import verbs  # noqa: E402
from workspace.host import git, plain_path, settings, setup_lock  # noqa: E402
from workspace.host.errors import reported_in_one_line  # noqa: E402
from workspace.host.paths import STATE  # noqa: E402

HARMFUL_VARIABLES = (
    # Every start of vLLM would compile thousands of modules: 20 s on 2 cores.
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONSAFEPATH",  # `python -m workspace` finds the package in the current folder
    "TAR_OPTIONS",
)
"""Variables of the user with which programs that we start would fail or behave differently."""


def main(arguments: list[str]) -> int:
    """Run the verb here, or set up the environment and continue there."""
    git.clear_repository_variables()
    for name in HARMFUL_VARIABLES:
        os.environ.pop(name, None)
    if FULL:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    plain_path.require_usable(ROOT)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs on the system's Python
        # tomllib and the workspace need 3.11: continue in an interpreter that has it.
        from workspace.environment.python import find_python

        python = find_python()
        os.execv(python, [python, __file__, *arguments])
    verb = verbs.named(*arguments[:1])
    options, chosen = verb.read(), settings.current()  # reports wrong values before any work
    settings.export(chosen)
    if verb.name == "inventory":
        # With the interpreter that the inventory describes: the file needs no other.
        python = shutil.which(chosen.python or "python3") or sys.executable
        script = ROOT / "workspace" / "environment" / "inventory.py"
        os.execv(python, [python, str(script), "inventory.json"])
    if verb.lock:
        setup_lock.take(verb.name)
    if verb.host:
        result = importlib.import_module(f"workspace.{verb.host}").run(options)
        if verb.name != "unbundle":
            return int(result)
        verb, chosen = verbs.named("dev"), result  # set up what was unpacked
        settings.export(chosen)
    return in_environment(verb, chosen)


def in_environment(verb: verbs.Verb, chosen: settings.Settings) -> int:
    """Create the environment if needed, and replace this process by the verb in it."""
    from workspace.environment import create
    from workspace.fork import rebase_state, tree_state
    from workspace.pins import release

    version, mode = rebase_state.release_for(verb.name), chosen.mode
    settings.export(replace(chosen, version=version))
    interpreter = create.existing(mode, version)
    if verb.name == "doctor":  # changes nothing
        if interpreter is None:
            return doctor_without_environment(as_json=verb.read().json)
    elif verb.name in ("fork-export", "fork-rebase", "upgrade"):
        # They work on trees only: any environment will do, so none is created for this release.
        ready = (create.existing(mode, known) for known in release.pins()["vllm"]["release"])
        interpreter = next(filter(None, ready), None) or create.ensure(mode, version)
    else:
        if verb.name == "dev":
            tree_state.require_switchable(version)
        interpreter = create.ensure(mode, version)
    return execute(interpreter, mode, verb.name)


def execute(interpreter: Path, mode: str, verb: str) -> NoReturn:
    """Replace this process by `python -m workspace VERB`."""
    # By a plain path, for the tools that the verb starts; installed files name the real one.
    folder = interpreter.parents[1]
    interpreter = plain_path.plain(folder.parent) / folder.name / "bin" / "python"
    os.environ.update(plain_path.variables())
    # Tools that start other tools (pre-commit, torch's inductor, ninja) find the pinned ones.
    os.environ["PATH"] = os.pathsep.join([str(interpreter.parent), os.environ.get("PATH", "")])
    if mode == "conda":
        # conda's Python is no venv: the user's site-packages would precede the locked packages.
        os.environ["PYTHONNOUSERSITE"] = "1"
    # `-m` finds the package in the current folder, so nothing is put on PYTHONPATH: there, our
    # folder `kernels/` could pass for the package of that name in every process.
    os.chdir(ROOT)
    os.execv(interpreter, [str(interpreter), "-m", "workspace", verb])


def doctor_without_environment(*, as_json: bool) -> int:
    if as_json:
        check = {"name": "environment", "status": "missing", "remedy": "make dev"}
        print(json.dumps({"usable": False, "checks": [check]}))
    else:
        print("environment: not set up; run: make dev")
    return 1


if __name__ == "__main__":
    with reported_in_one_line(STATE):
        sys.exit(main(sys.argv[1:]))
