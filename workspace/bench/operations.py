# SPDX-License-Identifier: Apache-2.0
"""OP= and BACKEND=: the operations that the custom variant runs, and their switches."""

import json

from workspace.host.errors import WorkspaceError
from workspace.pins import release

GEMM, ATTENTION = "gemm", "paged_attention"
GEMM_SWITCH, GEMM_BACKEND, GEMM_LAYERS = (
    "VLLM_USE_CUSTOM_GEMM", "VLLM_CUSTOM_GEMM_BACKEND", "VLLM_CUSTOM_GEMM_LAYERS",
)  # fmt: skip
OPS_SWITCH, OPS_LAYERS = "VLLM_CUSTOM_OPS", "VLLM_CUSTOM_OPS_LAYERS"
SWITCHES = (GEMM_SWITCH, GEMM_BACKEND, GEMM_LAYERS, OPS_SWITCH, OPS_LAYERS)


def chosen(op: str | None, backend: str | None) -> dict[str, str | None]:
    """Operation → backend or None (the best): of `rms_norm,silu_and_mul.triton`, by default of the
    GEMM; `backend` is that of a single operation.

    Raises:
        WorkspaceError: two backends for one operation, or one for several.
    """
    found: dict[str, str | None] = {}
    for word in filter(None, map(str.strip, (op or GEMM).split(","))):
        name, _, own = word.partition(".")
        if name in found:
            raise WorkspaceError(f"OP={op} names {name} twice; leave one of them out")
        found[name] = own or None
    if not found:
        raise WorkspaceError(f"OP={op} names no operation; leave it out for {GEMM}")
    if backend and (len(found) > 1 or any(found.values())):
        raise WorkspaceError(
            f"BACKEND={backend} beside OP={op}: name the backends there, such as "
            f"OP={','.join(f'{name}.{backend}' for name in found)}"
        )
    return dict.fromkeys(found, backend) if backend else found


def check(operations: dict[str, str | None], device: str) -> None:
    """Raise unless each operation enters vLLM and its backend can run on `device`.

    Raises:
        WorkspaceError: an unknown operation or backend, or one that this machine cannot run; names
            usable ones.
    """
    try:
        from custom_kernels import registry
        from custom_kernels.vllm import layers
    except ImportError as error:
        raise WorkspaceError(
            f"the kernels package cannot be imported ({error}); run make dev"
        ) from error
    entering = [GEMM, *layers.names()]
    for name, backend in operations.items():
        if name not in entering:
            raise WorkspaceError(
                f"OP={name}: no operation of this name enters vLLM; there are: "
                f"{', '.join(entering)}"
            )
        if name == ATTENTION and not attention_can_be_replaced():
            raise WorkspaceError(
                f"OP={name}: attention of vLLM {release.selected()} cannot be replaced; leave it "
                "out, or take a newer release with VLLM_VERSION"
            )
        if backend is None:
            continue
        backends = registry.operation(name).backends
        reasons = {one.name: one.unavailable_reason(device) for one in backends}
        usable = ", ".join(one for one, reason in reasons.items() if reason is None) or "none"
        reason = reasons.get(backend, "no such backend")
        if reason is not None:
            raise WorkspaceError(f"BACKEND={backend}: {reason}; usable here: {usable}")


def attention_can_be_replaced() -> bool:
    """Whether the active release has its registry of attention backends where we know it."""
    return (release.tree() / "vllm" / "v1" / "attention" / "backends" / "registry.py").is_file()


def interpreted(operations: dict[str, str | None]) -> bool:
    """Whether a backend is a Triton kernel, which Triton's interpreter can run on a CPU."""
    from custom_kernels import registry

    return any(
        backend and registry.operation(name).backend(backend).kind == "triton"
        for name, backend in operations.items()
    )


def ir_arguments(operations: dict[str, str | None]) -> tuple[str, ...]:
    """Arguments of vLLM by which they implement ops of its IR.

    Raises:
        WorkspaceError: an operation implements none, or this release has no IR.
    """
    from custom_kernels.vllm import ir_ops

    if not (release.tree() / "vllm" / "ir").is_dir():
        raise WorkspaceError(f"WAY=ir: vLLM {release.selected()} has no IR; leave it out")
    result: dict[str, list[str]] = {}
    for name, backend in operations.items():
        if name not in ir_ops.OPS:
            raise WorkspaceError(
                f"WAY=ir: {name} implements no op of vLLM's IR; there are: {', '.join(ir_ops.OPS)}"
            )
        provider = f"{ir_ops.PROVIDER}_{backend}" if backend else ir_ops.PROVIDER
        result |= {op: [provider] for op in ir_ops.OPS[name]}
    return ("--ir-op-priority", json.dumps(result))


def arguments(operations: dict[str, str | None], device: str) -> tuple[str, ...]:
    """Arguments of vLLM that they need: on a GPU the attention backend that decodes by ours, which
    vLLM would choose by itself on some GPUs only. On a CPU there is but one."""
    if ATTENTION in operations and device != "cpu":
        return ("--attention-backend", "CUSTOM")
    return ()


def switches(operations: dict[str, str | None], layers: str | None) -> dict[str, str]:
    """The environment that turns them on, in these layers only if patterns are given."""
    result: dict[str, str] = {}
    others = [
        f"{name}.{backend}" if backend else name
        for name, backend in operations.items()
        if name != GEMM
    ]
    if others:
        result[OPS_SWITCH] = ",".join(others)
        result |= {OPS_LAYERS: layers} if layers else {}
    if GEMM in operations:
        backend = operations[GEMM]
        result[GEMM_SWITCH] = "1"
        result |= {GEMM_BACKEND: backend} if backend else {}
        result |= {GEMM_LAYERS: layers} if layers else {}
    return result
