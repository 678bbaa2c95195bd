# SPDX-License-Identifier: Apache-2.0
"""Replace this process by a verb in the environment. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

from workspace.host import plain_path
from workspace.host.paths import ROOT


def become(interpreter: Path, mode: str, verb: str) -> NoReturn:
    """Replace this process by `python -m workspace VERB`."""
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
    os.execv(interpreter, [str(interpreter), "-m", "workspace", verb])


def doctor_without_environment(*, as_json: bool) -> int:
    """The doctor's answer where there is no environment to look into."""
    if as_json:
        check = {"name": "environment", "status": "missing", "remedy": "make dev"}
        print(json.dumps({"usable": False, "checks": [check]}))
    else:
        print("environment: not set up; run: make dev")
    return 1
