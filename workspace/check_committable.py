# SPDX-License-Identifier: Apache-2.0
"""The pre-commit check for what does not belong into the repository.

    python -m workspace.check_committable FILE ...

Large files, binaries (compiled code, weights), absolute paths of somebody's machine, and
addresses in files that pin packages: those must work behind any mirror.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MAX_BYTES = 700_000
"""The largest file that belongs here is a lock, about 530 kB."""

PICTURES = {".png"}
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home(?!/dev\b)|Users|root|work)/[\w.-]+")
"""The container's own user is dev, on every machine."""
ADDRESS = re.compile(r"https?://|--(?:extra-)?index-url|--find-links")
PINNING = re.compile(r"^(?:locks/|\.devcontainer/)|(?:^|/)(?:environment\.yml|requirements[^/]*)$")
FORBIDDEN_NAMES = {"uv.lock", "poetry.lock", "package-lock.json", "yarn.lock"}


def complaints(path: Path) -> list[str]:
    """Why this file cannot be committed; empty when it can."""
    content = path.read_bytes()
    found = []
    if len(content) > MAX_BYTES:
        found.append(f"{len(content)} bytes, more than {MAX_BYTES}")
    if path.name in FORBIDDEN_NAMES:
        found.append("a lock format that records addresses")
    if b"\0" in content:
        return found if path.suffix in PICTURES else [*found, "a binary"]
    text = content.decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            found.append(f"line {number} has a path of one machine: {line.strip()[:80]}")
        if PINNING.search(path.as_posix()) and ADDRESS.search(line):
            found.append(f"line {number} names an address: {line.strip()[:80]}")
    return found


def main(names: list[str]) -> int:
    failed = False
    for name in names:
        path = Path(name)
        if not path.is_file() or path.is_symlink():
            continue
        for complaint in complaints(path):
            print(f"{name}: {complaint}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
