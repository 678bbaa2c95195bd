# SPDX-License-Identifier: Apache-2.0
"""Profiles in files, with their provenance, and the last one of each kernel and case."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from custom_kernels import paths
from custom_kernels.bench.provenance import machine
from custom_kernels.bench.record import Provenance
from custom_kernels.command import write_whole
from custom_kernels.profile.figures import Profile

log = logging.getLogger(__name__)


class Recorded(BaseModel):
    """Profiles in a file, each under a name, and where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provenance: Provenance
    profiles: dict[str, Profile]


def made_here(profiles: Mapping[str, Profile], command: str) -> Recorded:
    """Profiles that were just made on this machine's GPU; ``command`` repeats them."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Recorded(provenance=machine(device, command), profiles=dict(profiles))


def write(path: Path, profiles: Mapping[str, Profile], command: str) -> None:
    """Write profiles that were made on this machine's GPU.

    Args:
        command: what repeats them.
    """
    _save(path, made_here(profiles, command))


def read(path: Path) -> Recorded:
    """Read what ``write`` wrote."""
    return Recorded.model_validate_json(path.read_text())


def exchange(name: str, recorded: Recorded, folder: Path | None = None) -> Recorded | None:
    """Keep a record as the last one of this name and GPU model.

    Args:
        folder: default: ``.workspace/profiles``.

    Returns:
        The one that was the last until now; None if there is none.
    """
    folder = folder or (paths.checkout() or Path.cwd()) / ".workspace" / "profiles"
    # Of another GPU model there is another file: times on two models say nothing of a kernel.
    slug = re.sub(r"[^\w.-]+", "-", f"{name}-{recorded.provenance.device}")
    path = folder / f"{slug}.json"
    last = None
    try:
        last = read(path)
    except FileNotFoundError:
        pass
    except (ValidationError, ValueError):
        log.warning("%s is no profile of this version: compared with nothing, replaced", path)
    _save(path, recorded)
    return last


def _save(path: Path, recorded: Recorded) -> None:
    text = recorded.model_dump_json(indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
