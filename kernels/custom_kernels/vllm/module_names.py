# SPDX-License-Identifier: Apache-2.0
"""Names of a model's modules ("model.layers.3.input_layernorm"), by torch's own hook for modules
that become part of another: most layer classes of vLLM are not told theirs."""

import weakref
from typing import Any

from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook

_parents: "weakref.WeakKeyDictionary[Module, tuple[weakref.ref[Module], str]]"
_parents = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def follow() -> None:
    """Remember from now on which module each module is first made part of."""
    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_registered))


def _registered(parent: Module, name: str, module: Module | None) -> None:
    if module is not None and module not in _parents:
        _parents[module] = (weakref.ref(parent), name)


def name(module: Module) -> str:
    """The module's name in the whole model; one that several layers share has the first one's. The
    class's name if it is part of none."""
    parts: list[str] = []
    inner: Module | None = module
    while inner is not None and inner in _parents:
        reference, part = _parents[inner]
        parts.append(part)
        inner = reference()
    return ".".join(reversed(parts)) or type(module).__name__
