# SPDX-License-Identifier: Apache-2.0
"""The pre-commit check for files that do not belong into the repository.

    python -m workspace.check_committable FILE ...

Large files, binaries (compiled code, weights), absolute paths of a machine, and addresses in files
that pin packages, which must work with any mirror.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 700_000
"""The largest file here is a lock, about 530 kB."""

IMAGES = {".png"}
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home(?!/dev\b)|Users|root|work)/[\w.-]+")
"""The user of the container is dev, on every machine."""
ADDRESS = re.compile(r"https?://|--(?:extra-)?index-url|--find-links")
PINNING = re.compile(r"^(?:locks/|\.devcontainer/)|(?:^|/)(?:environment\.yml|requirements[^/]*)$")
FORBIDDEN_NAMES = {"uv.lock", "poetry.lock", "package-lock.json", "yarn.lock"}


def problems(path: Path) -> Iterator[str]:
    """Why this file cannot be committed."""
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        yield f"{len(content)} bytes, more than {MAX_BYTES}"
    if path.name in FORBIDDEN_NAMES:
        yield "a lock format that records addresses"
    if b"\0" in content:
        if path.suffix not in IMAGES:
            yield "a binary"
        return
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"line {number} has a path of one machine: {line.strip()[:80]}"
        if PINNING.search(path.as_posix()) and ADDRESS.search(line):
            yield f"line {number} has an address: {line.strip()[:80]}"


def main(names: list[str]) -> int:
    paths = [Path(name) for name in names]
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    messages = [f"{path}: {problem}" for path in files for problem in problems(path)]
    print("".join(f"{message}\n" for message in messages), end="", file=sys.stderr)
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
