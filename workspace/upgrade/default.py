# SPDX-License-Identifier: Apache-2.0
"""Make a pinned release the default one: pins.toml, and which conda file has the plain name."""

from __future__ import annotations

import re

from workspace.environment import lock
from workspace.host.files import write_file
from workspace.host.paths import PINS
from workspace.pins.model import load


def make(version: str) -> None:
    line = re.compile(r'^(\[vllm\]\ndefault = )".*"', re.MULTILINE)
    text, count = line.subn(rf'\1"{version}"', PINS.read_text())
    assert count == 1
    write_file(PINS, text.encode())
    load.cache_clear()
    for known in load().vllm.release:
        lock.write_conda_file(known)
