# SPDX-License-Identifier: Apache-2.0
"""Buckets of M: a library's algorithms are searched once for each, and launches counted by them.

Every batch size that vLLM captures as a CUDA graph has a bucket; from 64 rows on there are four per
doubling.
"""

from collections.abc import Iterator


def buckets(rows: int) -> Iterator[int]:
    """All buckets up to the one that holds ``rows``, ascending; a bucket is named by its largest
    M."""
    bucket = 1
    while True:
        yield bucket
        if bucket >= rows:
            return
        bucket += step(bucket)


def bucket(rows: int) -> int:
    """The bucket that holds ``rows``."""
    *_, last = buckets(rows)
    return last


def step(bucket: int) -> int:
    """Distance to the next bucket: 1, 2, 4, 8, 16, 24, ... 64, 80, 96, 112, 128, 160, ... 256, 320,
    ..."""
    if bucket < 8:
        return bucket
    return max(8, 1 << (bucket.bit_length() - 3))
