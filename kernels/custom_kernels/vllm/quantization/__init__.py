# SPDX-License-Identifier: Apache-2.0
"""Quantization methods: one file each, named as in ``vllm bench --quantization <name>``.

They are found by looking, there is no list to edit: a file ``<name>.py`` here (a leading underscore
hides it) that defines ``Config``, a subclass of ``_base.Config`` or of vLLM's QuantizationConfig.
"""

import logging
from importlib import import_module
from pathlib import Path

log = logging.getLogger(__name__)

_registered: set[str] = set()


def names() -> list[str]:
    """Names of all methods, by their files alone: imports nothing."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def register() -> None:
    """Tell vLLM of every method. One that cannot be is left out, and said in one line."""
    from custom_kernels.vllm import upstream

    for name in names():
        if name in _registered:
            continue
        if name in upstream.quantization_methods():
            log.error("quantization/%s.py: vLLM has a method %r; rename the file", name, name)
            continue
        try:
            upstream.register_quantization(name, import_module(f"{__name__}.{name}").Config)
            _registered.add(name)
        except Exception as error:
            log.error("quantization/%s.py cannot be used: %r", name, error)
