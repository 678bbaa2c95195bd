# SPDX-License-Identifier: Apache-2.0
"""The archive of a bundle: what is laid out in it, and how it is cut into parts.

Its files are compressed already (wheels, git packs), so the archive itself is not. It is one tar
stream, cut into files of at most a given size, each with a heading; `unbundle.Joined` reads them as
one stream again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from custom_kernels.compile.sources import header_packages

from workspace.bundle import unbundle
from workspace.bundle.packages import Choice
from workspace.bundle.target import Host
from workspace.environment.fetch import sha256
from workspace.environment.progress import bytes_progress
from workspace.host.errors import WorkspaceError
from workspace.host.files import write_file
from workspace.host.text import say

TAR: Literal[1] = tarfile.GNU_FORMAT
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
SMALLEST_PART = 1000
"""Bytes: a part is more than its heading, and there are fewer than ten thousand."""


def part_size(text: str) -> int:
    """PARTS= in bytes: a number with K, M or G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    number = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < SMALLEST_PART:
        raise WorkspaceError(f"PARTS={text} is not a size; use e.g. PARTS=60M or PARTS=2G")
    return number


def recompressed(wheel: Path) -> Path:
    """The files of a released wheel with LZMA, in the cache; made if missing.

    For vLLM 0.25.1's CUDA wheel that saves 63 of 250 MB and takes one core four minutes. Names and
    CRCs are the wheel's, and `make dev` reads it as it reads the wheel.
    """
    target = wheel.with_name(f"{wheel.name}.lzma")
    if target.exists():
        return target
    say(f"recompressing the files of {wheel.name}, for this and later bundles")
    descriptor, name = tempfile.mkstemp(dir=wheel.parent, prefix="partial-")
    os.close(descriptor)
    partial = Path(name)
    try:
        with (
            zipfile.ZipFile(wheel) as source,
            zipfile.ZipFile(partial, "w", zipfile.ZIP_LZMA) as copy,
            bytes_progress() as bar,
        ):
            members = [member for member in source.infolist() if not member.is_dir()]
            task = bar.add_task("compressing", total=sum(member.file_size for member in members))
            for member in members:
                entry = zipfile.ZipInfo(member.filename, member.date_time)
                entry.external_attr, entry.compress_type = member.external_attr, zipfile.ZIP_LZMA
                with source.open(member) as content, copy.open(entry, "w") as file:
                    while chunk := content.read(1 << 20):
                        file.write(chunk)
                        bar.advance(task, len(chunk))
            if [(m.filename, m.CRC, m.file_size) for m in members] != [
                (m.filename, m.CRC, m.file_size) for m in copy.infolist()
            ]:
                raise AssertionError(f"{partial} does not hold the files of {wheel}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def lay_out(
    work: Path,
    cached: Mapping[str, tuple[Path, str]],
    wheels: Mapping[str, Path],
    choice: Choice,
    host: Host,
) -> None:
    """Lay out in `work` what the archive holds beside the two trees. Big files are linked.

    Args:
        cached: file and SHA-256 of what goes into the host's cache, by its name there.
        wheels: the wheel of each packed package.
    """
    (work / "cache").mkdir()
    for name, (path, _) in cached.items():
        (work / "cache" / name).symlink_to(path)
    (work / "packages" / "wheels").mkdir(parents=True)
    lines = []
    for entry in choice.packed:
        path = wheels[entry.name]
        (work / "packages" / "wheels" / path.name).symlink_to(path)
        lines.append(f"{entry.name}=={entry.version} --hash=sha256:{sha256(path)}\n")
    (work / "packages" / "requirements.txt").write_text("".join(lines))
    (work / "headers").mkdir()
    for name, folder, package in header_packages():
        if package.split()[0] not in {*host.packages, *wheels}:
            zip_headers(work / "headers" / f"{name}.zip", name, folder, package)


def zip_headers(archive: Path, name: str, folder: Path, package: str) -> None:
    """Headers that kernels take from a package, with the name and version of that package."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as content:
        content.writestr(f"{name}/package", f"{package}\n")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                content.write(path, f"{name}/include/{path.relative_to(folder)}")


def write(work: Path, folder: Path, manifest: dict[str, Any], limit: int) -> None:
    """Write the parts of what is in `work`, of at most `limit` bytes each, to `folder`, with the
    completed manifest and the script that reads them."""
    paths = [path for path in sorted(work.rglob("*")) if path.is_file()]
    # The workspace's tree comes first: the checkout is unpacked before anything else.
    paths.sort(key=lambda path: path.relative_to(work).parts[0] != unbundle.OWN)
    entries = [(path, _entry(path, work)) for path in paths]
    total = archive_size([entry for _, entry in entries])
    manifest["contents"] = [{"path": entry.name, "size": entry.size} for _, entry in entries]
    manifest["size"] = total
    manifest["identity"] = unbundle.identity_of(manifest)
    parts = Parts(folder, manifest["identity"], total, limit)
    with (
        bytes_progress() as bar,
        # tarfile writes, and asks for nothing else.
        tarfile.open(fileobj=cast("BinaryIO", parts), mode="w|", format=TAR) as archive,
    ):
        task = bar.add_task("writing parts", total=total)
        for path, entry in entries:
            with path.open("rb") as file:
                archive.addfile(entry, file)
            bar.advance(task, entry.size)
    manifest["parts"] = parts.finish()
    write_file(folder / unbundle.MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.copy(unbundle.__file__, folder / "unbundle.py")


def archive_size(entries: list[tarfile.TarInfo]) -> int:
    """Headers, contents in whole blocks, two empty blocks, filled up to a whole record."""
    block, record = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
    total = sum(len(entry.tobuf(TAR)) + -(-entry.size // block) * block for entry in entries)
    return -(-(total + 2 * block) // record) * record


def _entry(path: Path, work: Path) -> tarfile.TarInfo:
    """The same content gives the same archive: no owner, no time."""
    entry = tarfile.TarInfo(str(path.relative_to(work)))
    entry.size, entry.mode = path.stat().st_size, 0o644
    return entry


class Parts:
    """A file to write to, cut into `part-0001`, `part-0002`, … in `folder`.

    Args:
        total: bytes that will be written; each heading says how many parts there are.
        limit: the largest size of a part.
    """

    def __init__(self, folder: Path, identity: str, total: int, limit: int) -> None:
        self._folder, self._identity = folder, identity
        self._capacity = limit - len(unbundle.heading(identity, 1, 1))
        self._count = max(1, -(-total // self._capacity))
        if self._count > 9999:
            raise WorkspaceError(f"that would be {self._count} parts; use larger ones: PARTS=")
        self._file: BinaryIO | None = None
        self._left = 0
        self._written: list[dict[str, str | int]] = []
        self._next()

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if not self._left:
                self._next()
            self._put(rest[: self._left])
            rest, self._left = rest[self._left :], max(0, self._left - len(rest))
        return len(data)

    def _put(self, chunk: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(chunk)
        self._digest.update(chunk)

    def _next(self) -> None:
        self._end()
        number = len(self._written) + 1
        path = self._folder / f"part-{number:04d}"
        self._file, self._digest, self._left = path.open("xb"), hashlib.sha256(), self._capacity
        self._written.append({"name": path.name})
        self._put(unbundle.heading(self._identity, number, self._count))

    def _end(self) -> None:
        if self._file is not None:
            self._written[-1] |= {"size": self._file.tell(), "sha256": self._digest.hexdigest()}
            self._file.close()

    def finish(self) -> list[dict[str, str | int]]:
        """Close the last part; name, size and hash of each."""
        self._end()
        if len(self._written) != self._count:
            raise AssertionError(f"{len(self._written)} parts were written, not {self._count}")
        return self._written
