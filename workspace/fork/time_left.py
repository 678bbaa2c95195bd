# SPDX-License-Identifier: Apache-2.0
"""How long the rest of a build takes, from ninja's record of how long each file took before.

Files of one target take similar times; those of different targets do not: vLLM's own take many
times as long as those of the libraries that are compiled first. So a step counts as much as it took
in an earlier build, else as much as the mean of its target, else as the mean of all; then the
result is a lower bound and is called that.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from workspace.host.text import plural

STEP = re.compile(r"^\[(\d+)/(\d+)\] (.+)$")
"""ninja's line for a step, with `STATUS`; the last word is the file that it makes."""
STATUS = {"NINJA_STATUS": "[%f/%t] "}


def planned(command: list[str], env: dict[str, str]) -> set[str]:
    """The files that a `cmake --build` would make."""
    dry = subprocess.run(
        [*command, "--", "-n"], env={**env, **STATUS}, capture_output=True, text=True, check=False
    )
    return {step[3].split()[-1] for step in map(STEP.match, dry.stdout.splitlines()) if step}


def _target(output: str) -> str:
    folder, found, _ = output.partition(".dir/")
    return folder if found else ""


def durations(folder: Path) -> dict[str, float]:
    """File → seconds that ninja took to make it, for each that was made in this build folder."""
    log = folder / ".ninja_log"
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {row[3]: (int(row[1]) - int(row[0])) / 1000 for row in rows if len(row) == 5}


def left(remaining: set[str], known: dict[str, float], jobs: int) -> str:
    """Time for the remaining files, in words; empty if none remain or nothing is known yet.

    Of the last ones, which all compile at once, those that are new may take any time: upstream's
    slowest products took four minutes after every other file was done.
    """
    if not remaining or not known:
        return ""
    if len(remaining) <= jobs and remaining - known.keys():
        return f"{plural(len(remaining), 'step')} still running"
    of_target = defaultdict(list)
    for output, seconds in known.items():
        of_target[_target(output)].append(seconds)
    means = {target: fmean(values) for target, values in of_target.items()}
    mean = fmean(known.values())
    seconds = sum(known.get(one, means.get(_target(one), mean)) for one in remaining) / jobs
    unknown = {_target(one) for one in remaining - known.keys()} - means.keys() - {""}
    return f"{'at least' if unknown else 'about'} {max(1, round(seconds / 60))} min left"
