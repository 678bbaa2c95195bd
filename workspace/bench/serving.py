# SPDX-License-Identifier: Apache-2.0
"""METRIC=serve: its options, and which figures of the clients are compared.

The verdict of a run is about one figure. With all requests at once it is their rate, which sums up
everything that they wait for. A given rate fixes it as long as the server keeps up; then the
verdict is about the time per output token, of which most of a request's time consists.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from workspace.bench.record import Round, Unit
from workspace.host.errors import WorkspaceError

LIMITS = ("ttft", "tpot", "e2el")
"""What `vllm bench serve --goodput` knows: to the first token, per further token, in all."""


@dataclass(frozen=True)
class Kind:
    """A figure: the field of `record.Served`, its name and its unit."""

    field: str
    name: str
    unit: Unit


RATE = Kind("requests_per_s", "requests served", "requests/s")
FIRST = Kind("ttft_ms", "time to first token, median", "ms")
FIRST_99 = Kind("ttft_p99_ms", "time to first token, 99th percentile", "ms")
EACH = Kind("tpot_ms", "time per output token, median", "ms")
EACH_99 = Kind("tpot_p99_ms", "time per output token, 99th percentile", "ms")
GOOD = Kind("good_per_s", "requests within GOODPUT", "requests/s")


def kinds(output_len: int, request_rate: float | None, goodput: str | None) -> list[Kind]:
    """The figures of a run, the one with the verdict first."""
    times = [FIRST, FIRST_99]
    if output_len > 1:
        times = [*times, EACH, EACH_99]
    good = [GOOD] if goodput else []
    first = RATE if request_rate is None else EACH if EACH in times else FIRST
    return [first, *(kind for kind in (RATE, *times, *good) if kind is not first)]


def figures(kind: Kind, rounds: Iterable[Round]) -> list[float]:
    """That figure of each round."""
    return [getattr(done.served, kind.field) for done in rounds]


def request_rate(given: str | None) -> float | None:
    """Requests per second; None for all at once.

    Raises:
        WorkspaceError: it is no positive number.
    """
    rate = _number(given or "inf")
    if rate is None:
        raise WorkspaceError(
            f"REQUEST_RATE={given} is no number of requests per second; use e.g. REQUEST_RATE=4, "
            "or inf for all at once"
        )
    return None if math.isinf(rate) else rate


def goodput(given: str | None) -> str | None:
    """Limits in milliseconds as `vllm bench serve` takes them: "ttft:200 tpot:20".

    Raises:
        WorkspaceError: a name that it does not know, twice the same, or no positive number.
    """
    if given is None:
        return None
    pairs = [word.partition(":") for word in given.split()]
    names = [name for name, _, _ in pairs]
    numbers = [_number(value) for _, _, value in pairs]
    known = set(names) <= set(LIMITS) and len(names) == len(set(names))
    if not pairs or not known or not all(one and math.isfinite(one) for one in numbers):
        raise WorkspaceError(
            f"GOODPUT={given}: use milliseconds for {', '.join(LIMITS)}, e.g. "
            'GOODPUT="ttft:200 tpot:20"'
        )
    return " ".join(given.split())


def _number(text: str) -> float | None:
    """A positive number, perhaps infinite; None for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number > 0 else None
