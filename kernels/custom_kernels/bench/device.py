# SPDX-License-Identifier: Apache-2.0
"""What a GPU reaches at best, and what its clocks do while something is measured."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from custom_kernels.bench.record import Ceilings, ClockState
from custom_kernels.check.outputs import one_line


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
        except (RuntimeError, ValueError, AttributeError) as error:
            missing[name] = one_line(error)
    return Ceilings(
        bytes_per_second=2 * source.numel() / copy, flops_per_second=rates, missing=missing
    )


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

    def summary(self) -> ClockState:
        """Over all samples."""
        if not self._samples:
            return ClockState(unknown=self._problem or "not sampled")
        clocks = [clock for clock, _ in self._samples]
        reasons = functools.reduce(operator.or_, (bits for _, bits in self._samples))
        return ClockState(sm_mhz=(min(clocks), max(clocks)), reasons=self._names(reasons))

    def _names(self, bits: int) -> list[str]:
        held = []
        for name, words in self.SLOWDOWNS:
            bit: int = getattr(self._nvml, f"nvmlClocksEventReason{name}", 0)
            if bits & bit and words not in held:
                held.append(words)
        return held


def clock_warnings(clocks: Sequence[ClockState]) -> list[str]:
    """What makes the times of a run doubtful: heat, the hardware's own brakes, and clocks that
    moved within a case. At its power limit is where a large product runs, so that is recorded and
    no reason to doubt."""
    warnings = [
        f"the GPU was {reason} in {count} of {len(clocks)} cases"
        for reason in dict.fromkeys(text for _, text in Clocks.SLOWDOWNS[:-1])
        if (count := sum(reason in one.reasons for one in clocks))
    ]
    ranges = [one.sm_mhz for one in clocks if one.sm_mhz]
    moved = [(low, high) for low, high in ranges if low < (1 - Clocks.UNSTEADY) * high]
    if moved:
        warnings.append(
            f"the SM clock moved by more than {Clocks.UNSTEADY:.0%} in {len(moved)} of "
            f"{len(clocks)} cases ({min(low for low, _ in moved)} to "
            f"{max(high for _, high in moved)} MHz): ratios are still meaningful, times are not"
        )
    unknown = dict.fromkeys(one.unknown for one in clocks if one.unknown)
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
