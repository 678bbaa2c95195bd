# SPDX-License-Identifier: Apache-2.0
"""What the layers of the files here have in common: which of them run our kernels, with which
backend, and by what their calls are counted."""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from custom_kernels import launches
from custom_kernels.vllm import choice, module_names, upstream

log = logging.getLogger(__name__)

# For the checker: at run time the class of vLLM that is replaced is a base, too.
_Module = torch.nn.Module if TYPE_CHECKING else object


class Layer(_Module):
    """The first base of a layer class; the second is the class of vLLM that it replaces.

    A subclass defines ``custom``, and perhaps ``unsupported``.
    """

    custom: Callable[..., Any]
    """A method: the replaced ``forward`` by our operation, with its arguments and results."""

    operation: ClassVar[str]
    backend: ClassVar[str | None]

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.is_custom = False
        # Calls are counted by the address of a tensor: a name would be a constant of the graph, and
        # layers of equal shape would not be equal to the compiler.
        self.register_buffer("called", torch.zeros(1, dtype=torch.uint8), persistent=False)
        self.quant_method = upstream.AfterLoading(self._loaded)

    def unsupported(self) -> str | None:
        """Why this layer cannot run our operation; None if it can."""
        return None

    def forward(self, *arguments: Any, **more: Any) -> Any:
        """Ours if this layer is selected, else that of vLLM."""
        all_are_loaded()
        if self.is_custom:
            return self.custom(*arguments, **more)
        return super().forward(*arguments, **more)

    def backend_for(self, x: torch.Tensor) -> str:
        """The backend that computes in x's dtype on its device; empty: the best for each call."""
        return _backend(self.operation, self.backend, x.device.type, x.dtype)

    def _loaded(self) -> None:
        """The model is complete and has its weights."""
        name, called = module_names.name(self), self.called.data_ptr()
        self.is_custom = enter(self.operation, name, called, self.unsupported())


@torch.compiler.assume_constant_result
def _backend(operation: str, wanted: str | None, device_type: str, dtype: torch.dtype) -> str:
    return choose(operation, wanted, device_type, dtype)


choose = functools.cache(choice.backend)


def enter(operation: str, name: str, called: int, reason: str | None) -> bool:
    """The model has a layer of this name, whose calls are counted by the address ``called``.

    Args:
        reason: why it cannot run our operation, which is then announced.

    Returns:
        Whether it is to run our operation.
    """
    _wanted_layers().load(name)
    if reason:
        log.warning("%s: %s stays vLLM's own: %s", operation, name, reason)
        return False
    launches.layer(name, called)
    return takes(name)


def takes(name: str) -> bool:
    """Whether the layer of this name is selected."""
    return name in _wanted_layers()


@torch.compiler.assume_constant_result
def all_are_loaded() -> None:
    """A forward pass begins: patterns that match no layer of the model are announced, once."""
    _wanted_layers().warn_of_patterns_without_a_layer()


@functools.cache
def _wanted_layers() -> choice.Layers:
    return choice.Layers("VLLM_CUSTOM_OPS_LAYERS", upstream.wanted_op_layers())


def register(module: ModuleType, operation: str, backend: str | None) -> None:
    """Let vLLM build the layer classes of a file here in place of its own."""
    module_names.follow()
    for layer in list(vars(module).values()):
        if not isinstance(layer, type) or layer.__module__ != module.__name__:
            continue
        replaced = layer.__bases__[-1]
        if issubclass(layer, Layer) and replaced is not Layer:
            layer.operation, layer.backend = operation, backend
            upstream.replace_layer(replaced, layer)
