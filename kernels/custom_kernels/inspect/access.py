# SPDX-License-Identifier: Apache-2.0
"""What one load or store of a warp costs, from the addresses of its lanes. Needs no GPU.

Global memory moves in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes: in one pass each
bank delivers one word, to all lanes that want it; different words of one bank take a pass each.
Lanes that move 8 or 16 bytes go in groups of 16 or 8. Source: CUDA C++ Best Practices Guide,
"Coalesced Access to Global Memory", "Shared Memory and Memory Banks".
"""

from collections.abc import Iterable, Sequence

SECTOR = 32
"""Bytes."""
BANKS = 32
WORD = 4
"""Bytes of a bank."""


def bank(address: int) -> int:
    """The bank of shared memory that holds the byte ``address``."""
    return address // WORD % BANKS


def sectors(addresses: Iterable[int], width: int) -> int:
    """Sectors of global memory that a warp touches.

    Args:
        addresses: the first byte of each lane, in bytes.
        width: bytes per lane.
    """
    return len({unit for address in addresses for unit in _units(address, width, SECTOR)})


def passes(addresses: Sequence[int], width: int = WORD) -> int:
    """Passes through shared memory that a warp's load or store takes; the fewest is its bytes
    / 128, rounded up.

    Args:
        addresses: the first byte of each lane, in bytes.
        width: bytes per lane: at most 16.

    Raises:
        ValueError: no access is that wide.
    """
    if width not in (1, 2, 4, 8, 16):
        raise ValueError(f"a lane moves 1, 2, 4, 8 or 16 bytes at once, not {width}")
    lanes = BANKS * WORD // max(width, WORD)
    groups = [addresses[first : first + lanes] for first in range(0, len(addresses), lanes)]
    return sum(_passes_of_group(group, width) for group in groups)


def _passes_of_group(addresses: Iterable[int], width: int) -> int:
    words = {word for address in addresses for word in _units(address, width, WORD)}
    per_bank = [0] * BANKS
    for word in words:
        per_bank[word % BANKS] += 1
    return max(per_bank)


def _units(address: int, width: int, size: int) -> range:
    return range(address // size, (address + width - 1) // size + 1)
