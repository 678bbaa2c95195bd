# SPDX-License-Identifier: Apache-2.0
"""What is decided once for all calls: which backend runs an operation in vLLM, and in which layers.

Under torch.compile that is while it traces, and the decision becomes a constant of the graph; no
name of a layer does: layers of equal shape stay equal to the compiler.
"""

import logging
from fnmatch import fnmatchcase

import torch

from custom_kernels import registry

log = logging.getLogger(__name__)

SHOWN = 6
"""So many of a model's layers are named where a pattern matches none."""


def backend(operation: str, wanted: str | None, device_type: str, dtype: torch.dtype) -> str:
    """``wanted``; when that is None, none: then each call takes the best for its shapes.

    A layer whose dtype the wanted backend does not support (a float32 router in a bfloat16 model)
    goes to the best one that does, and that is announced. Raises registry.BackendError for a name
    that is wrong or cannot run here.
    """
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device_type, torch.accelerator.current_device_index())
    found = registry.operation(operation)
    chosen = found.backend(wanted) if wanted else found.best(device)
    chosen.require_available(device)
    if chosen.supports_dtype(dtype):
        return wanted or ""
    able = found.best(device, dtype).name
    log.warning(
        "%s: %s does not support %s, layers of that dtype run with %s",
        operation, chosen.name, dtype, able,
    )  # fmt: skip
    return able


class Layers:
    """The layers that run our kernels: those whose names match a pattern, or all of them.

    Args:
        variable: of the environment; its value, patterns as in a shell with commas between them, is
            ``patterns``.
    """

    def __init__(self, variable: str, patterns: str) -> None:
        self.variable = variable
        self.patterns = [one.strip() for one in patterns.split(",") if one.strip()]
        self._loaded: set[str] = set()
        self._warned = False

    def __contains__(self, name: object) -> bool:
        return not self.patterns or any(fnmatchcase(str(name), one) for one in self.patterns)

    def load(self, name: str) -> None:
        """The model has a layer of this name."""
        self._loaded.add(name)

    def warn_of_patterns_without_a_layer(self) -> None:
        """In the first call, when all layers are loaded."""
        if self._warned:
            return
        self._warned = True
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in self._loaded):
                some = ", ".join(sorted(self._loaded)[:SHOWN])
                log.warning(
                    "%s: %r matches none of the %d layers here, such as %s",
                    self.variable, pattern, len(self._loaded), some,
                )  # fmt: skip
