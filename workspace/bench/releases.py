# SPDX-License-Identifier: Apache-2.0
"""All differences between releases of vLLM that matter to the benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def random_lengths(tree: Path, input_len: int, output_len: int) -> list[str]:
    """Options of `vllm bench throughput` for the lengths of its random prompts.

    0.13.0 has only --input-len and --output-len; later releases add --random-input-len and
    --random-output-len, and 0.25.1 silently ignores the former. So the source in `tree` decides.
    """
    source = (tree / "vllm" / "benchmarks" / "throughput.py").read_text()
    prefix = "--random-" if "random_input_len" in source else "--"
    return [f"{prefix}input-len", str(input_len), f"{prefix}output-len", str(output_len)]


@contextmanager
def loaded_layer(layer: torch.nn.Module) -> Iterator[None]:
    """A layer of a model in an engine while its weights are written in place.

    If the layer is quantized while it is loaded, its weights are on the meta device: they get
    memory on entry and are quantized on exit. 0.13.0 allocates all weights at once.
    """
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import materialize_layer
    except ImportError:
        yield
        return
    info = get_layerwise_info(layer)
    if not info.can_load():  # not quantized, or from a checkpoint that is
        yield
        return
    materialize_layer(layer, info)
    yield
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    info.reset()
