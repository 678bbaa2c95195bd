# SPDX-License-Identifier: Apache-2.0
"""`make snapshots`: the snapshots on this machine."""

from __future__ import annotations

import json
from datetime import datetime

from workspace import verbs
from workspace.container.docker import docker
from workspace.container.image import PREFIX
from workspace.container.restore import Record
from workspace.container.snapshot import SNAPSHOT, UNFINISHED


def rows() -> list[list[str]]:
    """Name, date, size, versions and commits of each, the newest first."""
    labels = ["--filter", f"label={SNAPSHOT}", "--filter", f"label={UNFINISHED}=no"]
    names = docker("images", *labels, "--format", "{{.Repository}}:{{.Tag}}").splitlines()
    names = [name for name in names if "<none>" not in name]
    images = json.loads(docker("image", "inspect", *names)) if names else []
    table = []
    for name, image in zip(names, images, strict=True):
        described = image["Config"]["Labels"]
        record: Record = json.loads(described[SNAPSHOT])
        pins = json.loads(described.get(f"{PREFIX}.pins", "{}"))
        dirty = " with edits" if record["workspace"]["dirty"] else ""
        created = datetime.fromisoformat(described["org.opencontainers.image.created"])
        row = [
            name,
            f"{created.astimezone():%Y-%m-%d %H:%M}",
            f"{image['Size'] / 1e9:.1f} GB",
            ", ".join(f"{key} {pins[key]}" for key in ("vllm", "torch", "cuda") if key in pins),
            record["workspace"]["commit"][:10] + dirty,
            "; ".join(
                f"{version}: {fork['own_commits']} commits{', edits' if fork['dirty'] else ''}"
                for version, fork in record["fork"].items()
            ),
        ]
        table.append(row)
    return sorted(table, key=lambda row: row[1], reverse=True)


def run(_: verbs.NoOptions) -> int:
    heading = ["snapshot", "made", "size", "versions", "workspace", "local work in the fork"]
    table = [heading, *rows()]
    if len(table) == 1:
        print("no snapshots yet; make snapshot makes one")
        return 0
    widths = [max(len(row[column]) for row in table) for column in range(len(heading))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0
