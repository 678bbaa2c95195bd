# SPDX-License-Identifier: Apache-2.0
"""The layers of a model as vLLM builds it, without weights: a program in a process of its own.

    python -m workspace.bench.built_layers MODEL TOKENIZER

prints a line `LAYERS` and JSON: for every layer that a kernel of ours could run its name, its class
in vLLM, the operation that it is to vLLM, and whether the switches in the environment give it to
us.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

MARK = "LAYERS "
LINEAR, ATTENTION = "linear", "attention"
"""Operations without a name in vLLM's table of them."""


def main(model: str, tokenizer: str) -> None:
    import torch
    from custom_kernels.vllm import choice, upstream
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = EngineArgs(
        model=model, tokenizer=tokenizer, load_format="dummy", enforce_eager=True, max_model_len=128
    ).create_engine_config()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            built = initialize_model(vllm_config=config)
    gemm = choice.Layers("", upstream.wanted_layers()) if upstream.wants_gemm() else None
    found: list[tuple[str, str, str, bool]] = []
    for name, module in built.named_modules():
        inside = found and name.startswith(f"{found[-1][0]}.")  # it runs only as a part of that one
        if not inside and (operation := _operation(module)):
            found.append((name, type(module).__name__, operation, _is_ours(name, module, gemm)))
    print(MARK + json.dumps(found), flush=True)


def _operation(module: Any) -> str | None:
    from custom_kernels.vllm import upstream

    if upstream.is_linear_layer(module):
        return LINEAR
    if upstream.is_attention(module):
        return ATTENTION
    return upstream.operation_name(module)


def _is_ours(name: str, module: Any, gemm: Any) -> bool:
    from custom_kernels.vllm import upstream
    from custom_kernels.vllm.attention._decode import Decode
    from custom_kernels.vllm.layers import _base

    if upstream.is_linear_layer(module):
        return gemm is not None and name in gemm
    ours = getattr(module, "impl", None) if upstream.is_attention(module) else module
    known = isinstance(ours, _base.Layer | Decode)
    return known and _base.takes(name) and not ours.unsupported()


if __name__ == "__main__":
    main(*(str(Path(argument)) for argument in sys.argv[1:]))
