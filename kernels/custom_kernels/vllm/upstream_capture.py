# SPDX-License-Identifier: Apache-2.0
"""What ``capture`` reads of vLLM: the steps of a worker, and the layers of its model."""

import functools
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.worker.worker_base import WorkerWrapperBase

from custom_kernels.vllm import upstream
from custom_kernels.vllm.capture import METHOD, Steps

Shape = dict[str, int | bool]


def put_in(folder: Path) -> None:
    """Count the steps of every worker of this process from now on.

    The wrapper around a worker is what an executor calls: what a worker runs by itself to measure
    its memory, to warm up and to capture graphs does not pass through it.
    """
    if hasattr(WorkerWrapperBase, METHOD):
        return
    execute, shutdown = WorkerWrapperBase.execute_model, WorkerWrapperBase.shutdown

    def steps(self: Any) -> Steps:
        if "_captured" not in vars(self):
            self._captured = Steps(folder, _about(self.worker))
        return self._captured  # type: ignore[no-any-return]

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *arguments: Any) -> Any:
        done = execute(self, scheduler_output, *arguments)
        if scheduler_output.total_num_scheduled_tokens:
            steps(self).count(*_ran(self.worker.model_runner, scheduler_output))
        return done

    @functools.wraps(shutdown)
    def shut_down(self: Any) -> Any:
        if "_captured" in vars(self):
            self._captured.write()
        return shutdown(self)

    def captured_steps(self: Any, what: str) -> None:
        getattr(steps(self), what)()

    WorkerWrapperBase.execute_model, WorkerWrapperBase.shutdown = execute_model, shut_down
    setattr(WorkerWrapperBase, METHOD, captured_steps)


def _ran(runner: Any, scheduled: Any) -> tuple[int, int, int, float | None]:
    """The arguments of ``Steps.count`` for a step that has just been launched."""
    tokens, requests = scheduled.total_num_scheduled_tokens, len(scheduled.num_scheduled_tokens)
    drafted = sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
    # Kept for the sampler, with the rows that the model ran. Only the last stage of a pipeline has
    # it.
    hidden = getattr(getattr(runner, "execute_model_state", None), "hidden_states", None)
    padded = hidden.shape[0] if isinstance(hidden, torch.Tensor) else tokens
    length = None
    if tokens == requests:
        before = sum(scheduled.scheduled_cached_reqs.num_computed_tokens)
        before += sum(one.num_computed_tokens for one in scheduled.scheduled_new_reqs)
        length = before / requests + 1
    return padded, tokens, requests + drafted, length


def _about(worker: Any) -> dict[str, Any]:
    config = worker.vllm_config
    model, parallel = config.model_config, config.parallel_config
    name = Path(model.model).name if Path(model.model).is_dir() else model.model
    on_gpu = worker.device.type == "cuda"
    found, left_out = layers(
        worker.model_runner.get_model(), model.get_hidden_size(), config.cache_config.block_size
    )
    return {
        "rank": parallel.data_parallel_rank * parallel.world_size + worker.rank,
        "vllm": upstream.VERSION,
        "device": torch.cuda.get_device_name(worker.device) if on_gpu else worker.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": name,
        "layers": found,
        "left_out": left_out,
    }


def layers(
    model: torch.nn.Module, hidden_size: int, page: int
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The layers of a model that are operations of ours, those of equal shape together; and by
    class the names of those that could be replaced but are none that we can describe."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[Any, ...], list[str]] = {}
    left_out: dict[str, list[str]] = {}
    seen: set[int] = set()
    outer = " "
    for name, module in modules.items():
        operation = _operation(name, module)
        # One rotary embedding serves all layers; anything else that has two names runs once.
        again = id(module) in seen and operation not in ("rotary_embedding", None)
        if operation is None or again or name.startswith(f"{outer}."):
            continue
        seen.add(id(module))
        outer = name
        beside = [*modules.get(name.rpartition(".")[0], model).children()]
        shape = _shape(operation, module, beside, hidden_size, page)
        if shape is None:
            left_out.setdefault(type(module).__name__, []).append(name)
            continue
        if (
            operation == "rms_norm"
            and ".0." in name
            and not any(key[0] == operation for key in found)
        ):
            shape["residual"] = False  # nothing to add yet, but in later stages of a pipeline
        rows = {"paged_attention": "decodes", "lm_head": "outputs"}.get(operation, "tokens")
        method = _method(module)
        if operation in ("gemm", "lm_head"):
            operation = "gemm" if method is None else "quantized_gemm"
        key = (operation, rows, method, *shape.items())
        found.setdefault(key, []).append(name)
    return [
        {"operation": operation, "rows": rows, "method": method, "shape": dict(shape), "names": on}
        for (operation, rows, method, *shape), on in found.items()
    ], left_out


def _operation(name: str, module: torch.nn.Module) -> str | None:
    if isinstance(module, VocabParallelEmbedding):  # a head may be tied to the embedding
        is_head = isinstance(module, ParallelLMHead) or name.rpartition(".")[2] == "lm_head"
        return "lm_head" if is_head else None
    if upstream.is_linear_layer(module):
        return "gemm"
    return "paged_attention" if upstream.is_attention(module) else upstream.operation_name(module)


def _method(module: torch.nn.Module) -> str | None:
    """The class of a quantization method; None for a layer that is not quantized."""
    method = getattr(module, "quant_method", None)
    # Exactly these: a method may be made from one of them.
    plain = {UnquantizedLinearMethod, UnquantizedEmbeddingMethod, upstream.AfterLoading, type(None)}
    return None if type(method) in plain else type(method).__name__


def _shape(
    operation: str, module: Any, beside: list[Any], hidden_size: int, page: int
) -> Shape | None:
    """What an operation's cases are made from, of this worker's part of the layer."""
    if operation == "lm_head":
        n, k = module.num_embeddings_per_partition, module.embedding_dim
        return {"N": n, "K": k, "bias": getattr(module, "bias", None) is not None}
    if operation == "gemm":
        added = module.bias is not None and not module.skip_bias_add
        if isinstance(module, RowParallelLinear):  # the sum over all ranks gets it once
            added = added and module.tp_rank == 0
        return {"N": _width(module, "output"), "K": _width(module, "input"), "bias": added}
    if operation == "rms_norm":
        # Python does not see whether a compiled norm gets a residual. As models are built, those
        # over the hidden size do, but the first. Those of heads do not, and have a row per head.
        width = getattr(module, "weight", torch.empty(0)).shape[-1]
        return {"K": width, "residual": True} if width == hidden_size else None
    if operation == "silu_and_mul":
        linear = [one for one in beside if upstream.is_linear_layer(one)]
        inputs = {_width(one, "input") for one in linear}
        fitting = {k for k in inputs if 2 * k in {_width(one, "output") for one in linear}}
        return {"K": fitting.pop()} if len(fitting) == 1 else None
    if operation not in ("rotary_embedding", "paged_attention"):
        return None
    attention = [one for one in beside if type(one).__name__ == "Attention"]
    if len(attention) != 1 or (operation == "paged_attention" and attention != [module]):
        return None
    (one,) = attention
    heads: Shape = {
        "heads": one.num_heads, "kv_heads": one.num_kv_heads, "head_size": one.head_size
    }  # fmt: skip
    if operation == "rotary_embedding":
        return heads | {"rotary": module.rotary_dim, "is_neox": module.is_neox_style}
    return None if one.sliding_window else heads | {"page": page}


def _width(linear: Any, side: str) -> int:
    width: int = getattr(linear, f"{side}_size_per_partition", getattr(linear, f"{side}_size"))
    return width
