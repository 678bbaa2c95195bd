# SPDX-License-Identifier: Apache-2.0
"""Layers of vLLM that run an operation of ours: one file each, named as the operation; attention
is in a folder of its own.

``VLLM_CUSTOM_OPS="rms_norm,silu_and_mul.triton"`` names those that do, perhaps with a backend.
Every other layer is vLLM's own; its file is not even imported.

They are found by looking, there is no list to edit: a file ``<operation>.py`` here (a leading
underscore hides it) that defines classes with two bases, ``_base.Layer`` and the class of vLLM that
they replace. vLLM then builds them in its place wherever a model asks for that class
(``CustomOp.register_oot``).
"""

from importlib import import_module
from pathlib import Path

from custom_kernels import paths
from custom_kernels.vllm import attention

_registered: set[str] = set()


def names() -> list[str]:
    """Names of all operations that can enter as a layer, by their files alone: imports nothing."""
    files = Path(__file__).parent.glob("*.py")
    found = [path.stem for path in files if not path.stem.startswith("_")]
    if (paths.PACKAGE / attention.OPERATION).is_dir():  # a wheel may hold other operations only
        found.append(attention.OPERATION)
    return sorted(found)


def wanted(text: str) -> dict[str, str | None]:
    """Operation → backend or None, of a text like ``rms_norm,silu_and_mul.triton``.

    Raises ValueError for an operation that cannot enter as a layer.
    """
    found = {}
    for word in filter(None, map(str.strip, text.split(","))):
        operation, _, backend = word.partition(".")
        if operation not in names():
            raise ValueError(
                f"VLLM_CUSTOM_OPS: no layer of vLLM runs {operation!r}; there are: "
                f"{', '.join(names())}"
            )
        found[operation] = backend or None
    return found


def register() -> None:
    """Replace the layer classes of the wanted operations; a second call changes nothing."""
    from custom_kernels.vllm import upstream

    for operation, backend in wanted(upstream.wanted_ops()).items():
        if operation in _registered:
            continue
        if operation == attention.OPERATION:
            attention.register(backend)
        else:
            from custom_kernels.vllm.layers import _base

            _base.register(import_module(f"{__name__}.{operation}"), operation, backend)
        _registered.add(operation)
