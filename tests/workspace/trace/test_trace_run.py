# SPDX-License-Identifier: Apache-2.0
"""`make trace` as a whole: vLLM's engine under its profiler, stock and custom."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.trace import runner
from workspace.trace.record import Record
from workspace.verbs import Trace

LAYERS = {
    "self_attn.qkv_proj", "self_attn.rotary_emb", "self_attn.attn", "self_attn.o_proj",
    "input_layernorm", "post_attention_layernorm", "mlp.gate_up_proj", "mlp.act_fn",
    "mlp.down_proj", "model.norm", "lm_head", "sampling",
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.slow
def test_a_trace_names_the_layer_of_every_op_and_shows_both_variants_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RECORDS", "RUNS", "LOGS"):
        monkeypatch.setattr(runner, name, tmp_path / name.lower())
    monkeypatch.setattr(runner, "LOCK", tmp_path / "lock")
    runner.run(Trace(op="gemm", num_prompts=3, output_len=5))
    (path,) = (tmp_path / "records").glob("*.json")
    made = Record.model_validate_json(path.read_text())
    assert made.valid
    assert [side.name for side in made.sides] == ["stock", "custom"]
    stock, custom = made.sides
    assert stock.launches == {}
    assert all(counts["gemm.reference"] > 0 for counts in custom.launches.values())
    for side in made.sides:
        phases = {one.phase: one for one in side.phases}
        prefill, decode = phases["prefill"], phases["decode"]
        assert (prefill.tokens, prefill.requests, prefill.steps) == (96, 3, 1)
        assert (decode.tokens, decode.requests, decode.steps) == (3, 3, 3)
        assert decode.parts().keys() >= LAYERS
        assert decode.attributed == 1
        assert 0 < decode.busy_us <= decode.us
    ran = {row.kernel: row.calls for row in custom.phases[-1].rows if row.part == "mlp.down_proj"}
    assert ran["custom_kernels::gemm"] == 2  # layers
    (trace, other) = (path.parent / Path(name).name for side in made.sides for name in side.traces)
    for one in (trace, other):
        assert json.loads(gzip.decompress(one.read_bytes()))["traceEvents"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(ROOT) not in path.read_text()
    printed = capfd.readouterr().out
    assert "stock, decode: 3 steps of 3 tokens of 3 requests, tiny-qwen2" in printed
    assert "decode: µs a step" in printed
    assert not list((tmp_path / "runs").iterdir())


def test_compiled_code_for_a_cpu_is_refused_because_its_trace_names_no_ops() -> None:
    with pytest.raises(WorkspaceError, match="EAGER=0: what torch"):
        runner.prepare(Trace(eager="0"), runner.detect_device())
