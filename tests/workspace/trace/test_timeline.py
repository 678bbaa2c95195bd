# SPDX-License-Identifier: Apache-2.0
"""Steps, kernels and gaps out of a trace, and what each kernel belongs to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from workspace.host.errors import WorkspaceError
from workspace.trace import parts, summary, timeline
from workspace.trace.messages import Linear

PREFILL, DECODE = "execute_context_2(64)_generation_0(0)", "execute_context_0(0)_generation_2(2)"
EMPTY = "execute_context_0(0)_generation_0(0)"
NAMES = [f"model.layers.0.{one}" for one in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")]
LINEAR = [Linear(name=name, n=4096, k=4096, bytes=2 * 4096 * 4096) for name in NAMES]
LINEAR.append(Linear(name="lm_head", n=32768, k=4096, bytes=2 * 32768 * 4096))
# The kernels of a layer and of the head, in their order, with their microseconds.
KERNELS = [
    ("triton_red_fused__to_copy_embedding_mean_mul_pow_rsqrt_0", 2.0),
    ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNT", 40.0),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>(cublasLt::cublasSplitKParams<float>)", 4.0),
    ("triton_poi_fused_cat_mul_sub_1", 3.0),
    ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>(unsigned char*)", 2.0),
    ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<int>>(flash::Params)", 30.0),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_gemm>(Params)", 20.0),
    ("triton_red_fused_add_mean_mul_pow_rsqrt_2", 2.0),
    ("nvjet_sm90_tst_128x128", 80.0),
    ("triton_poi_fused_gemm_mul_silu_slice_3", 5.0),
    ("void (anonymous namespace)::skinny<__nv_bfloat16, 4>(Arguments)", 40.0),
    ("nvjet_sm90_tst_256x64", 90.0),
    ("void at::native::reduce_kernel<512, 1, at::native::ArgMaxOps<float>>(float)", 6.0),
]
KERNEL_US = sum(us for _, us in KERNELS)
STEP_US = 400.0


def event(category: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    tid = 7 if category in timeline.DEVICE else 1
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": ts,
        "dur": dur,
        "tid": tid,
        "args": args,
    }


def gpu_steps(steps: list[str]) -> list[dict[str, Any]]:
    """A step launches its kernels at once, as a CUDA graph does, and ahead of the device."""
    events = []
    for number, name in enumerate(steps):
        begin, on_device = 100.0 * number, 1000 + STEP_US * number
        events.append(event("user_annotation", name, begin, 90.0))
        events.append(event("cuda_runtime", "cudaGraphLaunch", begin + 5, 9.0, correlation=number))
        for kernel, us in KERNELS if name != EMPTY else ():
            events.append(event("kernel", kernel, on_device, us, correlation=number))
            on_device += us
    return events


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    path = folder / "rank0.pt.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_kernels_belong_to_the_step_that_launched_them_and_the_rest_of_it_is_gaps(
    tmp_path: Path,
) -> None:
    steps = timeline.read(written(tmp_path, gpu_steps([PREFILL, *[DECODE] * 3, EMPTY])))
    assert [step.phase for step in steps] == ["prefill", "decode", "decode", "decode"]
    assert [(step.tokens, step.requests) for step in steps] == [(64, 2), (2, 2), (2, 2), (2, 2)]
    assert [len(step.pieces) for step in steps] == [len(KERNELS)] * 4
    assert [step.us for step in steps] == [STEP_US] * 3 + [None]
    prefill, decode = summary.phases(steps, LINEAR, None, {})
    assert (prefill.steps, decode.steps) == (1, 2)  # the last one has no end
    assert decode.busy_us == pytest.approx(KERNEL_US)
    assert decode.gaps_us == pytest.approx(STEP_US - KERNEL_US)
    assert decode.attributed == 1


def test_products_are_the_linear_layers_in_their_order_and_others_are_named_by_what_they_do(
    tmp_path: Path,
) -> None:
    (step, *_) = timeline.read(written(tmp_path, gpu_steps([DECODE, DECODE])))
    of = [part for part, _ in parts.attribute(step, [one.name for one in LINEAR])]
    assert of == [
        "norm", "qkv_proj", "qkv_proj", "between qkv_proj and o_proj", "KV cache", "attention",
        "o_proj", "norm", "gate_up_proj", "activation", "down_proj", "lm_head", "sampling",
    ]  # fmt: skip


def test_what_cannot_be_told_is_not_attributed(tmp_path: Path) -> None:
    (step, *_) = steps = timeline.read(written(tmp_path, gpu_steps([DECODE, DECODE])))
    names = [one.name for one in LINEAR[1:]]  # a model with one layer fewer
    of = [part for part, _ in parts.attribute(step, names)]
    assert of.count("linear layers") == 6
    assert of[3] == of[-1] == parts.OTHER
    (decode,) = summary.phases(steps, LINEAR[1:], None, {})
    assert decode.attributed == pytest.approx(1 - 9 / KERNEL_US)


def test_overlapping_kernels_take_together_as_long_as_the_device_was_busy(tmp_path: Path) -> None:
    events = gpu_steps([DECODE, DECODE])
    early = event("kernel", "triton_poi_fused_gemm_mul_silu_slice_3", 1010, 500.0, correlation=0)
    (step, _) = timeline.read(written(tmp_path, [*events, early]))
    assert step.busy_us == pytest.approx(510)


def test_a_layer_at_its_roofline_is_bound_by_bytes_or_by_operations(tmp_path: Path) -> None:
    steps = timeline.read(written(tmp_path, gpu_steps([PREFILL, DECODE, DECODE])))
    fast, slow = {"bfloat16": 1e15}, {"bfloat16": 1e12}
    (_, decode) = summary.phases(steps, LINEAR, 4e12, fast)
    least = {row.part: row.roofline_us for row in decode.rows}
    moved = 2 * 4096 * 4096 + 2 * 2 * (4096 + 4096)
    assert least["o_proj"] == pytest.approx(moved / 4e12 * 1e6)
    assert least["attention"] is None
    both = [row.roofline_us or 0 for row in decode.rows if row.part == "qkv_proj"]
    assert len(both) == 2
    assert sum(both) == pytest.approx(moved / 4e12 * 1e6)
    (prefill, _) = summary.phases(steps, LINEAR, 4e12, slow)
    least = {row.part: row.roofline_us for row in prefill.rows}
    assert least["o_proj"] == pytest.approx(2 * 64 * 4096 * 4096 / 1e12 * 1e6)
    assert least["lm_head"] == pytest.approx(2 * 2 * 32768 * 4096 / 1e12 * 1e6)  # 2 requests


def test_on_a_cpu_ops_belong_to_the_innermost_layer_around_them(tmp_path: Path) -> None:
    layer = "layer: model.layers.3.mlp"
    events = [
        event("user_annotation", DECODE, 0, 100),
        event("cpu_op", "aten::slice", 1, 2),
        event("user_annotation", layer, 10, 50),
        event("user_annotation", f"{layer}.down_proj", 20, 30),
        event("cpu_op", "aten::linear", 22, 20),
        event("cpu_op", "aten::addmm", 23, 18),  # a part of the op around it
        event("cpu_op", "aten::add", 55, 3),
        event("user_annotation", "layer: sampler", 110, 20),
        event("cpu_op", "aten::argmax", 112, 10),
        event("user_annotation", DECODE, 200, 100),
    ]
    (step, _) = timeline.read(written(tmp_path, events))
    assert [(part, piece.name, piece.us) for part, piece in parts.attribute(step, [])] == [
        (parts.BETWEEN, "aten::slice", 2),
        ("mlp.down_proj", "aten::linear", 20),
        ("mlp", "aten::add", 3),
        ("sampling", "aten::argmax", 10),
    ]
    assert step.us == 199


def test_names_of_kernels_lose_their_arguments() -> None:
    named = {
        "void (anonymous namespace)::skinny<__nv_bfloat16, 4>(Arguments)": "skinny",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<A<int>, B>>(flash::Params)": (
            "cutlass::device_kernel"
        ),
        "triton_poi_fused_cat_1": "triton_poi_fused_cat_1",
        "_C::rotary_embedding": "_C::rotary_embedding",
        "Memcpy DtoH (Device -> Pinned)": "MemcpyDtoH",
    }
    assert {name: summary.kernel_name(name) for name in named} == named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"no gzip", "is not a trace of torch's profiler"),
        # mtime=0: the bytes name the test, and every worker of pytest must collect the same names.
        (gzip.compress(b'{"traceEvents": []}', mtime=0), "has no step of vLLM's engine in it"),
    ],
)
def test_a_file_without_steps_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "rank0.pt.trace.json.gz"
    path.write_bytes(text)
    with pytest.raises(WorkspaceError, match=message):
        timeline.read(path)
