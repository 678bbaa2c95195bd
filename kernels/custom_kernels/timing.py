# SPDX-License-Identifier: Apache-2.0
"""Time implementations of an operation against each other, as inference would run them.

- **Cold L2.** In inference a layer's weights come from HBM: by the time its turn comes again, the
  other layers have pushed them out. So each CUDA graph runs over several input sets in turn,
  together at least twice the size of L2.
- **No launch gaps.** Every contender is captured into a CUDA graph, long enough that the gap
  between two replays does not count, and timed by events around a replay.
- **Interleaved.** Replays go in palindromic blocks, A B C C B A, without a pause, and are compared
  block by block, so that a drift of clocks or temperature hits all contenders alike.
- **Checked while measured.** Inputs are fresh random numbers in every repetition. Before the first
  and after the last repetition the outputs are poisoned, and what a replay leaves there is compared
  with the exact result. A contender that is wrong, does not fit or cannot run is recorded as such
  and does not stop the others.

On a CPU the same runs with the host's clock and without graphs: that is for trying out a case, a
kernel or this module itself, and gives no figure worth recording.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from custom_kernels.intervals import CONFIDENCE, coverage, median_interval

DIFFERENT_FROM = 0.01
"""Two contenders are called different when their ratio is surely further than this from 1 ..."""
SAME_WITHIN = 0.02
"""... and the same when it is surely within this."""

COLD_FACTOR = 2
"""How many times the size of L2 lies between two uses of the same input set."""
MAX_SETS = 256
"""Input sets at most: an operation so small that more were needed finds its input in L2 in
inference too, where the operation before it has just written it."""
REPLAY_SECONDS = 300e-6
"""A replay shorter than this goes through the input sets more than once: what lies between two
replays, a microsecond or two, should not count."""
MAX_ROUNDS = 16

_CHECKED_ROWS = 48
_POISON: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_0000_0000_D1E5),
    torch.float32: (torch.int32, 0x7FC0_D1E5),
    torch.float16: (torch.int16, 0x7ED1),
    torch.bfloat16: (torch.int16, 0x7FD1),
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
    torch.float8_e5m2: (torch.uint8, 0x7D),
    torch.int8: (torch.int8, -128),
}
"""Bits that no kernel writes: a NaN of our own, which arithmetic does not produce (the only NaN in
e4m3), and the one int8 that symmetric quantization leaves out."""


def same_arguments(inputs: Sequence[Any]) -> Sequence[Any]:
    """The contender takes the operation's own arguments."""
    return inputs


def always_available(_: torch.device) -> str | None:
    """The contender runs everywhere."""
    return None


@dataclass(frozen=True)
class Case:
    """One shape at which an operation is measured or checked."""

    labels: dict[str, str | int]
    """What tells it from the others, for example ``{"model": ..., "layer": "qkv", "M": 16}``."""
    empty_inputs: Callable[[torch.device], tuple[Any, ...]]
    """Allocates the operation's arguments, not yet filled."""
    fill: Callable[[Sequence[Any]], None]
    """Fills them in place with fresh random numbers."""
    flops: float
    """Floating-point operations of one call, as a dense product would need them."""
    bytes: float
    """The fewest bytes one call moves through HBM: each input read once, the output written
    once."""
    tolerance: float
    """The largest acceptable error."""
    error: Callable[[Sequence[Any], Any], float] | None = None
    """``error(inputs, outputs)``. None: ‖out - exact‖ / ‖exact‖ over some rows, the first and the
    last among them; the first input then has a row per token, and outputs must be finite."""
    peak: str = "bfloat16"
    """Whose dense matmul rate is the ceiling: bfloat16, float16, float8_e4m3fn or int8."""


@dataclass(frozen=True)
class Contender:
    """One thing that is timed: a backend of ours, or what a user would call instead."""

    name: str
    run: Callable[..., Any]
    """Called with what ``prepare`` returned, as positional arguments."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = same_arguments
    """Makes its arguments from the operation's, outside of the timing: packs or quantizes a weight,
    say. It is called once per input set, and again where results are checked, since inputs are then
    other numbers; tensors that it makes anew are copied over those of the first call. Everything
    else stays: what ``fill`` refreshes must either be passed on or end up in a tensor."""
    unavailable: Callable[[torch.device], str | None] = always_available
    """Why it cannot run on a device."""


@dataclass(frozen=True)
class Times:
    """Microseconds per call, over all blocks."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Result:
    """One contender at one case."""

    name: str
    times: Times | None = None
    """None if it failed."""
    error: float | None = None
    """The largest seen in the checks."""
    ratio: float | None = None
    """Median over blocks of baseline time / own time: above 1 it is faster. None for a contender
    without times, and for all if the baseline has none."""
    low: float | None = None
    high: float | None = None
    """95 % confidence interval of the ratio."""
    repetitions: tuple[float, ...] = ()
    """The ratio in each repetition alone."""
    blocks: int = 0
    failure: str | None = None

    @property
    def verdict(self) -> str | None:
        """FASTER, SLOWER, SAME, or AMBIGUOUS when the interval does not settle it; None without a
        ratio."""
        if self.ratio is None or self.low is None or self.high is None:
            return None
        return verdict(self.low, self.high, self.blocks, self.repetitions)


@dataclass(frozen=True)
class Measurement:
    """One case, all contenders."""

    case: Case
    baseline: str
    results: dict[str, Result]
    sets: int
    """Input sets that a replay goes through."""
    rounds: int
    """How often it goes through them."""
    cold: bool
    """Whether the sets are together large enough that every call finds a cold L2."""
    clocks: dict[str, Any] = field(default_factory=dict)
    """What the driver said of the clocks meanwhile, see Clocks.summary."""


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured now."""

    bytes_per_second: float
    """A large device-to-device copy, bytes read plus bytes written."""
    flops_per_second: dict[str, float]
    """An 8192-cubed dense product of random numbers through torch, per dtype: the best of some. A
    kernel can be above it, where torch's is not as fast as the chip or the chip was warmer."""
    missing: dict[str, str] = field(default_factory=dict)
    """Dtypes whose product this device or torch cannot do, and why."""


class WrongResultError(RuntimeError):
    """A contender does not compute what the reference does, so its time means nothing."""


class DeviceLostError(RuntimeError):
    """A contender left the device in an error, after which nothing in this process can run on
    it."""


# --- measuring ------------------------------------------------------------------------------------


def measure(
    case: Case,
    contenders: Sequence[Contender],
    exact: Callable[..., Any],
    device: torch.device,
    seconds: float = 0.25,
    repetitions: int = 3,
) -> Measurement:
    """Measure all contenders at ``case``, for about ``seconds`` of device time in all. The first is
    the baseline of the ratios.

    Raises ValueError without contenders or with a name twice, and DeviceLostError if a contender
    broke the device; anything else that goes wrong with a contender is in its result.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contenders must have names of their own, got {names}")
    failures: dict[str, str] = {}
    errors = dict.fromkeys(names, 0.0)
    sets = _input_sets(case, device)
    sides: dict[str, _Side] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            result = action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return result
        except Exception as error:
            failures[name] = _said(error)
            sides.pop(name, None)
        _still_alive(device, name, failures[name])
        return None

    def build(contender: Contender) -> None:
        reason = contender.unavailable(device)
        if reason is not None:
            failures[contender.name] = reason
            return
        side = _SIDES[device.type](contender, case, sets)
        side.warm_up()
        sides[contender.name] = side

    def check(name: str) -> None:
        for inputs in sets:
            case.fill(inputs)
        errors[name] = max(errors[name], sides[name].error(exact))

    for contender in contenders:
        attempt(contender.name, functools.partial(build, contender))
    once = {name: attempt(name, side.replay_seconds) for name, side in list(sides.items())}
    rounds = rounds_for([time for time in once.values() if time is not None])
    if rounds > 1:
        for name, side in list(sides.items()):
            attempt(name, functools.partial(side.extend, rounds))
    for name in list(sides):
        attempt(name, functools.partial(check, name))

    fastest_first = sum(once[name] for name in sides) * rounds
    blocks = max(3, min(100, math.ceil(seconds / repetitions / (2 * fastest_first or 1))))
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    clocks = Clocks(device)
    for _ in range(repetitions if sides else 0):
        for inputs in sets:
            case.fill(inputs)
        order = [name for _ in range(blocks) for name in palindrome(list(sides))]
        pending = [(name, sides[name].timed_replay()) for name in order]
        clocks.sample()  # while the device is at work
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls = len(sets) * rounds
        elapsed = [(name, seconds_of() * 1e6 / calls) for name, seconds_of in pending]
        for name, values in per_block(elapsed, blocks).items():
            times[name].append(values)
    for name in list(sides):
        attempt(name, functools.partial(check, name))

    return Measurement(
        case=case,
        baseline=names[0],
        results=_results(names, names[0], times, errors, failures),
        sets=len(sets),
        rounds=rounds,
        cold=len(sets) * case.bytes >= COLD_FACTOR * _l2_bytes(device),
        clocks=clocks.summary(),
    )


def palindrome(names: Sequence[str]) -> list[str]:
    """A B C C B A: whatever drifts, and whatever one leaves behind for the next, weighs on all
    alike."""
    return [*names, *reversed(names)]


def per_block(elapsed: Sequence[tuple[str, float]], blocks: int) -> dict[str, list[float]]:
    """For every name the mean of its two times in each block, in order."""
    if blocks < 1 or len(elapsed) % blocks:
        raise ValueError(f"{len(elapsed)} times are not {blocks} blocks")
    size = len(elapsed) // blocks
    means: dict[str, list[float]] = {}
    for start in range(0, len(elapsed), size):
        block: dict[str, list[float]] = {}
        for name, value in elapsed[start : start + size]:
            block.setdefault(name, []).append(value)
        for name, values in block.items():
            means.setdefault(name, []).append(statistics.mean(values))
    return means


def rounds_for(seconds: Collection[float]) -> int:
    """How often a replay must go through the input sets so that the fastest contender's lasts
    REPLAY_SECONDS."""
    fastest = min(seconds, default=REPLAY_SECONDS)
    return max(1, min(MAX_ROUNDS, math.ceil(REPLAY_SECONDS / max(fastest, 1e-9))))


def _results(
    names: Sequence[str],
    baseline: str,
    times: dict[str, list[list[float]]],
    errors: dict[str, float],
    failures: dict[str, str],
) -> dict[str, Result]:
    right = {name: repetitions for name, repetitions in times.items() if name not in failures}
    return {
        name: Result(name, failure=failures[name])
        if name in failures
        else result(name, right[name], right.get(baseline), errors[name], name == baseline)
        for name in names
    }


def result(
    name: str,
    own: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]] | None,
    error: float,
    is_baseline: bool = False,
) -> Result:
    """A contender's result from its times and the baseline's, [repetitions][blocks] in
    microseconds."""
    flat = [value for repetition in own for value in repetition]
    times = Times(statistics.median(flat), *_spread(flat))
    if is_baseline or base is None:
        return Result(name, times, error, blocks=len(flat))
    ratios = [
        [theirs / ours for theirs, ours in zip(base_blocks, own_blocks, strict=True)]
        for base_blocks, own_blocks in zip(base, own, strict=True)
    ]
    every = [ratio for repetition in ratios for ratio in repetition]
    low, high, _ = median_interval(every)
    return Result(
        name,
        times,
        error,
        ratio=statistics.median(every),
        low=low,
        high=high,
        repetitions=tuple(map(statistics.median, ratios)),
        blocks=len(every),
    )


def verdict(low: float, high: float, blocks: int, repetitions: Sequence[float] = ()) -> str:
    """FASTER or SLOWER: the whole interval is more than 1 % off 1, and every repetition agrees.
    SAME: the interval is within 2 %. AMBIGUOUS: anything else, and too few blocks for an
    interval."""
    if coverage(blocks, 1) < CONFIDENCE:
        return "AMBIGUOUS"
    if low > 1 + DIFFERENT_FROM:
        return "FASTER" if all(ratio > 1 for ratio in repetitions) else "AMBIGUOUS"
    if high < 1 - DIFFERENT_FROM:
        return "SLOWER" if all(ratio < 1 for ratio in repetitions) else "AMBIGUOUS"
    return "SAME" if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN else "AMBIGUOUS"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    quantiles = statistics.quantiles(values, n=5, method="inclusive")
    return quantiles[0], quantiles[3]


# --- poison ---------------------------------------------------------------------------------------


def tensors(structure: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in nested tuples, lists and dicts, and inside of tensor subclasses."""
    if isinstance(structure, torch.Tensor):
        if is_traceable_wrapper_subclass(structure):
            names, _ = structure.__tensor_flatten__()
            for name in names:
                yield from tensors(getattr(structure, name))
        else:
            yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from tensors(item)
    elif isinstance(structure, dict):
        yield from tensors(tuple(structure.values()))


def poison(outputs: Any) -> None:
    """Fill outputs with what no kernel writes; dtypes that have no such value with an unlikely
    one."""
    for output in tensors(outputs):
        if output.dtype in _POISON:
            bits, pattern = _POISON[output.dtype]
            output.view(bits).fill_(pattern)
        elif output.dtype == torch.bool:
            output.fill_(True)
        elif output.is_complex():
            output.fill_(complex(math.nan, math.nan))
        elif output.is_floating_point():
            output.fill_(math.nan)
        else:
            # An unsigned number has no value that stands out.
            output.fill_(torch.iinfo(output.dtype).min or 0xA5)


def unwritten(outputs: Any) -> int:
    """How many elements still hold the poison, in dtypes that have one."""
    count = 0
    for output in tensors(outputs):
        if output.dtype in _POISON:
            bits, pattern = _POISON[output.dtype]
            count += int((output.view(bits) == pattern).sum())
    return count


class PoisonedMemory(TorchDispatchMode):
    """Inside of it, memory that torch allocates uninitialized is poisoned.

    This is how an output that a kernel forgot is found where there is no CUDA graph whose outputs
    could be poisoned before a replay. It sees what Python code allocates, not what an operator
    allocates inside.
    """

    _EMPTY = frozenset(
        {
            torch.ops.aten.empty,
            torch.ops.aten.empty_like,
            torch.ops.aten.empty_strided,
            torch.ops.aten.new_empty,
            torch.ops.aten.new_empty_strided,
        }
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in self._EMPTY:
            poison(out)
        return out


# --- one contender --------------------------------------------------------------------------------


class _Side:
    """One contender over all input sets: what a device type does not decide."""

    def __init__(self, contender: Contender, case: Case, sets: Sequence[tuple[Any, ...]]) -> None:
        self.contender = contender
        self.case = case
        self.sets = sets
        self.rounds = 1
        self.prepared = [contender.prepare(inputs) for inputs in sets]
        self.outputs: list[Any] = [None] * len(sets)

    def warm_up(self) -> None:
        raise NotImplementedError

    def extend(self, rounds: int) -> None:
        """From now on a replay goes through the sets ``rounds`` times."""
        self.rounds = rounds

    def poisoned_replay(self) -> None:
        raise NotImplementedError

    def timed_replay(self) -> Callable[[], float]:
        """Start a replay; the function gives its seconds once the device is synchronized."""
        raise NotImplementedError

    def replay_seconds(self) -> float:
        self.timed_replay()
        seconds_of = self.timed_replay()
        if self.sets and (device := _device(self.sets[0])) is not None:
            torch.cuda.synchronize(device)
        return seconds_of()

    def error(self, exact: Callable[..., Any]) -> float:
        """The largest error of the first and the last set, on the inputs as they are now. Raises
        WrongResultError."""
        checked = sorted({0, len(self.sets) - 1})
        for index in checked:
            self._prepare_again(index)
        self.poisoned_replay()
        return max(
            error_of(self.case, self.sets[index], self.outputs[index], exact) for index in checked
        )

    def call_all(self) -> None:
        for index, arguments in enumerate(self.prepared):
            # The output of the round before lives until this one is made: outputs rotate as well.
            self.outputs[index] = self.contender.run(*arguments)

    def _prepare_again(self, index: int) -> None:
        new = self.contender.prepare(self.sets[index])
        for old, fresh in zip(tensors(self.prepared[index]), tensors(new), strict=True):
            if old.data_ptr() != fresh.data_ptr():
                old.copy_(fresh)


class _Graph(_Side):
    """On a GPU: captured once, replayed."""

    def warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # outside of the capture: compiles, searches, loads modules
            for arguments in self.prepared[:2]:
                self.contender.run(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        self._capture()

    def extend(self, rounds: int) -> None:
        super().extend(rounds)
        self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.outputs = [None] * len(self.sets)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self.rounds):
                self.call_all()

    def poisoned_replay(self) -> None:
        poison(self.outputs)
        self._graph.replay()

    def timed_replay(self) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3


class _Calls(_Side):
    """On a CPU: called, with the host's clock."""

    def warm_up(self) -> None:
        self.call_all()

    def poisoned_replay(self) -> None:
        with PoisonedMemory():
            self.call_all()

    def timed_replay(self) -> Callable[[], float]:
        start = time.perf_counter()
        for _ in range(self.rounds):
            self.call_all()
        elapsed = time.perf_counter() - start
        return lambda: elapsed


def captured(contender: Contender, case: Case, inputs: tuple[Any, ...]) -> _Graph:
    """The contender warmed up and captured in a CUDA graph on one input set; ``error(exact)`` of
    the result poisons the outputs, replays and checks."""
    graph = _Graph(contender, case, [inputs])
    graph.warm_up()
    return graph


_SIDES: dict[str, type[_Side]] = {"cuda": _Graph, "cpu": _Calls}


def error_of(case: Case, inputs: Sequence[Any], outputs: Any, exact: Callable[..., Any]) -> float:
    """The error of outputs that were poisoned before the call. Raises WrongResultError if it is
    larger than the case allows, or if an element was not written."""
    left = unwritten(outputs)
    if left:
        raise WrongResultError(f"{left} elements of the output were not written")
    if case.error is not None:
        error = case.error(inputs, outputs)
    else:
        for output in tensors(outputs):
            if output.is_floating_point() and not torch.isfinite(output.float()).all():
                raise WrongResultError("the output has elements that are not finite")
        error = _relative_error(inputs, outputs, exact)
    if not error <= case.tolerance:
        raise WrongResultError(f"error {error:.1e}, {case.tolerance:.1e} is allowed")
    return error


def _relative_error(inputs: Sequence[Any], outputs: Any, exact: Callable[..., Any]) -> float:
    x, *others = inputs
    rows = torch.linspace(0, x.shape[0] - 1, min(_CHECKED_ROWS, x.shape[0])).long().to(x.device)
    wanted = list(tensors(exact(x[rows], *others)))
    worst = 0.0
    for output, right in zip(tensors(outputs), wanted, strict=True):
        got, right = output[rows].double(), right.double()
        if got.shape != right.shape:
            raise WrongResultError(
                f"the output has shape {list(output.shape)}, its rows should be "
                f"{list(right.shape[1:])}"
            )
        size = float(right.norm())
        worst = max(worst, float((got - right).norm()) / (size or 1.0))
    return worst


def _input_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """Enough input sets to hold COLD_FACTOR times the L2 between two uses of the same one."""
    wanted = 1 + math.ceil(COLD_FACTOR * _l2_bytes(device) / max(case.bytes, 1.0))
    sets = [case.empty_inputs(device) for _ in range(max(2, min(MAX_SETS, wanted)))]
    for inputs in sets:
        case.fill(inputs)
    return sets


def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def _device(structure: Any) -> torch.device | None:
    """The GPU that inputs lie on, None if they lie on none."""
    found = next((tensor.device for tensor in tensors(structure)), None)
    return found if found is not None and found.type == "cuda" else None


def _said(error: Exception) -> str:
    """One line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    return first if isinstance(error, WrongResultError) else f"{type(error).__name__}: {first}"


def _still_alive(device: torch.device, name: str, failure: str) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(f"{name} left the GPU in an error: {failure}") from error


# --- ceilings and clocks --------------------------------------------------------------------------


def ceilings(device: torch.device, dtypes: Iterable[str] = ("bfloat16",)) -> Ceilings:
    """Measure what the device can do with copies and with dense products in these dtypes; less than
    a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source))
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    size = 8192
    for name in dict.fromkeys(dtypes):
        try:
            rates[name] = 2 * size**3 / _best_seconds(_product(name, size, device))
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            missing[name] = _said(error)
    return Ceilings(2 * source.numel() / copy, rates, missing)


def _product(dtype: str, size: int, device: torch.device) -> Callable[[], Any]:
    """A dense product of two random square matrices, through the function that torch has for the
    dtype."""
    if dtype == "int8":
        a, b = (
            torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
            for _ in range(2)
        )
        return lambda: torch._int_mm(a, b.t())
    if dtype == "float8_e4m3fn":
        one = torch.ones((), device=device)
        a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    return lambda: a @ b.t()


def _best_seconds(function: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


class Clocks:
    """What the driver says of the clocks while something runs, through NVML where its Python
    package (nvidia-ml-py) is installed."""

    SLOWDOWNS = (
        ("SwThermalSlowdown", "slowed down by heat"),
        ("HwThermalSlowdown", "slowed down by heat"),
        ("HwSlowdown", "slowed down by the hardware"),
        ("HwPowerBrakeSlowdown", "slowed down by the power brake"),
        ("SwPowerCap", "held at its power limit"),
    )
    UNSTEADY = 0.05
    """Clocks that differ by more than this within a case are worth a warning."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[tuple[int, int]] = []
        self._nvml, self._handle, self._problem = _nvml(device)

    def sample(self) -> None:
        """Note the SM clock and the reasons for which it is held down."""
        if self._nvml is None:
            return
        try:
            self._samples.append(
                (
                    self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM),
                    self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle),
                )
            )
        except self._nvml.NVMLError as error:
            self._nvml, self._problem = None, f"NVML: {error}"

    def summary(self) -> dict[str, Any]:
        """``sm_mhz``: lowest and highest; ``reasons``: why they were held down; ``unknown``: why
        nothing is known."""
        if not self._samples:
            return {"unknown": self._problem or "not sampled"}
        clocks = [clock for clock, _ in self._samples]
        reasons = 0
        for _, bits in self._samples:
            reasons |= bits
        return {"sm_mhz": [min(clocks), max(clocks)], "reasons": self._names(reasons)}

    def _names(self, bits: int) -> list[str]:
        held = []
        for name, words in self.SLOWDOWNS:
            bit: int = getattr(self._nvml, f"nvmlClocksEventReason{name}", 0)
            if bits & bit and words not in held:
                held.append(words)
        return held


def clock_warnings(clocks: Sequence[dict[str, Any]]) -> list[str]:
    """What in the clocks summaries of a run makes its times doubtful: heat, the hardware's own
    brakes, and clocks that moved within a case. The power limit alone is where a large product
    runs, so it is recorded but no reason to doubt."""
    warnings = []
    for reason in dict.fromkeys(words for _, words in Clocks.SLOWDOWNS[:-1]):
        if count := sum(reason in one.get("reasons", ()) for one in clocks):
            warnings.append(f"the GPU was {reason} in {count} of {len(clocks)} cases")
    moved = [
        one["sm_mhz"]
        for one in clocks
        if "sm_mhz" in one and one["sm_mhz"][0] < (1 - Clocks.UNSTEADY) * one["sm_mhz"][1]
    ]
    if moved:
        warnings.append(
            f"the SM clock moved by more than {Clocks.UNSTEADY:.0%} in {len(moved)} of "
            f"{len(clocks)} cases ({min(low for low, _ in moved)} to "
            f"{max(high for _, high in moved)} MHz): ratios bear that, times do not"
        )
    unknown = dict.fromkeys(one["unknown"] for one in clocks if "unknown" in one)
    return warnings + [f"the clocks were not watched: {reason}" for reason in unknown]


def _nvml(device: torch.device) -> tuple[Any, Any, str | None]:
    if device.type != "cuda":
        return None, None, "not a GPU"
    try:
        import pynvml
    except ImportError:
        return None, None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        # torch counts the devices that CUDA_VISIBLE_DEVICES leaves, NVML all of them.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), None
    except pynvml.NVMLError as error:
        return None, None, f"NVML: {error}"
