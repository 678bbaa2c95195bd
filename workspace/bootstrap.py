# SPDX-License-Identifier: Apache-2.0
"""From any Python 3 to the workspace's environment, then on to the verb.

    python3 workspace/bootstrap.py VERB

Verbs that need no environment run here. For the others, each step is skipped when its inputs have
not changed: choose an interpreter, fetch uv at its pinned version, create the environment, install
the lock into it, and replace this process by `python -m workspace VERB` of that environment.

Standard library only, and the first lines run on any Python 3: nothing is installed yet.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workspace import verbs  # noqa: E402
from workspace.host import git, plain_path, settings, setup_lock  # noqa: E402
from workspace.host.errors import reported_in_one_line  # noqa: E402
from workspace.host.paths import STATE  # noqa: E402

UNWANTED = (
    # Every start of vLLM would compile thousands of modules anew: 20 s on 2 cores.
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONSAFEPATH",  # `python -m workspace` finds the package in the current folder
    "TAR_OPTIONS",
)
"""Variables of the user's under which what we start would fail or do something else."""


def main(arguments: list[str]) -> int:
    """Run the verb here, or set up the environment and become the verb."""
    git.forget_surroundings()
    for name in UNWANTED:
        os.environ.pop(name, None)
    plain_path.require_usable(ROOT)
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs on the system's Python
        # tomllib and the workspace need 3.11; go on in an interpreter that has it.
        from workspace.environment.python import find_python

        python = find_python()
        os.execv(python, [python, __file__, *arguments])
    verb = verbs.named(*arguments[:1])
    options, chosen = verb.read(), settings.current()  # a wrong value ends it before any work
    settings.hand_on(chosen)
    if verb.name == "inventory":
        # With the interpreter that is asked about: the file needs no other.
        python = shutil.which(chosen.python or "python3") or sys.executable
        script = ROOT / "workspace" / "environment" / "inventory.py"
        os.execv(python, [python, str(script), "inventory.json"])
    if verb.lock:
        setup_lock.take(verb.name)
    if verb.host:
        result = importlib.import_module(f"workspace.{verb.host}").run(options)
        if verb.name != "unbundle":
            return int(result)
        verb, chosen = verbs.named("dev"), result  # what is unpacked is set up
        settings.hand_on(chosen)
    return in_environment(verb, chosen)


def in_environment(verb: verbs.Verb, chosen: settings.Settings) -> int:
    """Make the environment if need be, and become the verb in it."""
    from workspace.environment import create, enter
    from workspace.fork import rebase_state, tree_state

    version = rebase_state.release_for(verb.name)
    settings.hand_on(replace(chosen, version=version))
    if verb.name == "doctor":  # it only looks: nothing is set up
        interpreter = create.ready(chosen.mode, version)
        if interpreter is None:
            return enter.doctor_without_environment(as_json=verb.read().json)
    elif verb.name in ("fork-export", "fork-rebase"):
        # They work on trees only: no other release's gigabytes are fetched for them.
        interpreter = create.any_ready(chosen.mode) or create.ensure(chosen.mode, version)
    else:
        if verb.name == "dev":
            tree_state.require_switchable(version)
        interpreter = create.ensure(chosen.mode, version)
    enter.become(interpreter, chosen.mode, verb.name)
    return None


if __name__ == "__main__":
    with reported_in_one_line(STATE):
        sys.exit(main(sys.argv[1:]))
