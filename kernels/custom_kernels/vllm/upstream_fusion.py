# SPDX-License-Identifier: Apache-2.0
"""Quantization as part of the norm or activation before it: a pass over vLLM's graphs, and all that
we read of vLLM for it.

Where a ``quant_expand`` is all that uses what an RMS norm or ``silu(gate) · up`` returns, the two
become ``rms_norm_quant`` or ``silu_mul_quant``. vLLM runs the pass on every graph that it compiles,
after its own fusions and before it lowers its IR, of which norms are nodes (in 0.13 they are plain
torch). Imported where it is asked for and not before: it needs vLLM's compiler.
"""

import functools
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._inductor import pattern_matcher
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul

from custom_kernels import registry
from custom_kernels.source_hash import source_hash

log = init_logger("vllm.custom_kernels.fusion")  # vLLM shows what is logged below "vllm"


def _op(name: str) -> Any:
    assert registry.operation(name).module  # registers it
    return getattr(torch.ops.custom_kernels, name).default


LONGEST_NORM, LONGEST_ACTIVATION = 15_360, 46_080
"""Values of a row, of q after a norm, up to which it fits into the shared memory of any GPU: 99 KiB
of a block."""

QUANT, NORM, SILU = map(_op, ("quant_expand", "rms_norm_quant", "silu_mul_quant"))


class FuseQuantization(InductorPass):
    """Counts what it fuses, and says it at the graph that holds the model's last norm, whose result
    nothing quantizes."""

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()

    def uuid(self) -> str:
        return source_hash()

    def __call__(self, graph: fx.Graph) -> None:
        for kind in {node.args[1:] for node in _calls(graph, QUANT)}:
            self.fused["activations"] += _activation(kind).apply(graph)
        for node in _calls(graph, QUANT):
            self.fused["norms"] += fuse_norm(graph, node)
        if any(map(_is_last_norm, graph.nodes)):
            found, self.fused = self.fused, Counter()
            if found.total():
                what = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
                log.info("quantization is part of %s", what)
            else:
                log.info("nothing is fused: no quantization follows a norm or an activation")


def fuse_norm(graph: fx.Graph, quant: fx.Node) -> bool:
    """Fuse a quantization with the norm before it. Returns whether there is one that fits."""
    y, *kind = quant.args
    assert isinstance(y, fx.Node)
    if y.target is operator.getitem and y.args[1] == 0:
        norm, name = y.args[0], "fused_add_rms_norm"
    else:
        norm, name = y, "rms_norm"
    if not isinstance(norm, fx.Node) or not _is_ir(norm, name) or len(y.users) > 1:
        return False
    *tensors, epsilon, variance_size = (*norm.args, None)[: 4 if norm is y else 5]
    x, residual, weight = tensors if norm is not y else (tensors[0], None, tensors[1])
    fits = all(one is None or _is_bfloat16(one) for one in (x, residual))
    if not fits or not _is_bfloat16(weight) or variance_size is not None:
        return False
    if quant.meta["val"][0].shape[-1] > LONGEST_NORM:
        return False
    with graph.inserting_before(norm):
        fused = graph.call_function(NORM, (x, residual, weight, epsilon, *kind))
    values: Any = fx.map_arg(fused.args, lambda node: node.meta["val"])
    with values[0].fake_mode:
        fused.meta["val"] = NORM(*values)
    for user in list(quant.users):  # q and scale
        user.args = (fused, user.args[1])
        fused.append(user)
    graph.erase_node(quant)
    if norm is not y:
        graph.erase_node(y)
        for user in list(norm.users):  # the new residual
            user.args = (fused, 2)
    graph.erase_node(norm)
    return True


@functools.cache
def _activation(kind: tuple[Any, ...]) -> pattern_matcher.PatternMatcherPass:
    """silu(gate) · up as vLLM writes it, then quant_expand with these arguments after x."""

    def unfused(x: torch.Tensor) -> Any:
        return QUANT(SiluAndMul.forward_native(x), *kind)

    def fused(x: torch.Tensor) -> Any:
        return SILU(x, *kind)

    def fits(match: pattern_matcher.Match) -> bool:
        return bool(match.kwargs["x"].meta["val"].shape[-1] <= 2 * LONGEST_ACTIVATION)

    register: Any = pattern_matcher.register_replacement  # its own types do not fit each other
    found = pattern_matcher.PatternMatcherPass("custom_kernels.activations")
    with torch._guards.tracing(None), unset_fake_temporarily(), FakeTensorMode():
        example = torch.empty(8, 64, dtype=torch.bfloat16)
        register(unfused, fused, [example], pattern_matcher.fwd_only, found, extra_check=fits)
    return found


def _calls(graph: fx.Graph, op: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=op))


def _is_ir(node: fx.Node, name: str) -> bool:
    return str(node.target) == f"vllm_ir.{name}.default"


def _is_bfloat16(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dtype == torch.bfloat16


def _is_last_norm(node: fx.Node) -> bool:
    if _is_ir(node, "fused_add_rms_norm"):
        returned = [user for user in node.users if user.args[1] == 0]
    else:
        returned = [node] if _is_ir(node, "rms_norm") else []
    return any(user.op == "output" for one in returned for user in one.users)
