# SPDX-License-Identifier: Apache-2.0
"""Layers: folded to kinds, counted, and held against the patterns that chose them."""

import pytest

from tests.workspace.bench.samples import plan, result
from workspace.bench import checks, layers, report
from workspace.bench.evaluate import variant_record
from workspace.bench.measure import ProcessRun, require_matching_layers
from workspace.bench.variants import stock_and_custom
from workspace.host.errors import WorkspaceError

COUNTED: dict[str, dict[str, int]] = {
    "model.layers.0.self_attn.o_proj": {},
    "model.layers.0.mlp.down_proj": {"gemm.reference": 30},
    "model.layers.1.self_attn.o_proj": {},
    "model.layers.1.mlp.down_proj": {"gemm.reference": 31},
    "lm_head": {},
}
PATTERNS = "*.mlp.*"


def test_names_are_folded_by_their_indices_alone() -> None:
    assert layers.folded("model.layers.11.mlp.down_proj") == "model.layers.*.mlp.down_proj"
    assert layers.folded("blocks.0.experts.12") == "blocks.*.experts.*"
    assert layers.folded("h2o.layer3.fc1") == "h2o.layer3.fc1"


def test_one_name_of_each_kind_is_shown() -> None:
    assert layers.one_of_each(COUNTED) == [
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj",
    ]  # fmt: skip
    assert len(layers.one_of_each(f"layer{i}" for i in range(50))) == 8


def test_kinds_tell_what_ran_in_how_many_layers_and_how_often() -> None:
    doubled = layers.total([COUNTED, COUNTED])
    assert layers.kinds(doubled) == [
        layers.Kind("model.layers.*.self_attn.o_proj", layers.UPSTREAM, 2, 0, 0),
        layers.Kind("model.layers.*.mlp.down_proj", "gemm.reference", 2, 60, 62),
        layers.Kind("lm_head", layers.UPSTREAM, 1, 0, 0),
    ]


def test_the_lines_show_one_kind_each() -> None:
    made = plan(layers=PATTERNS)
    _, custom = stock_and_custom(made)
    ran = ProcessRun(1, 0, custom, result(layers={11: COUNTED, 12: COUNTED}))
    assert report.layer_lines(variant_record(made, custom, [ran])) == [
        "layers of custom, calls in 2 processes:",
        "  model.layers.*.self_attn.o_proj  vLLM's own      2 layers",
        "  model.layers.*.mlp.down_proj     gemm.reference  2 layers, 60 to 62 calls each",
        "  lm_head                          vLLM's own      1 layer",
    ]


def test_the_lines_show_which_kernel_ran_for_how_many_tokens() -> None:
    made = plan()
    _, custom = stock_and_custom(made)
    one = {"gemm.skinny": {1: 4, 16: 96}, "gemm.cublaslt": {24: 7, 2048: 1200}}
    ran = ProcessRun(1, 0, custom, result(tokens={11: one, 12: {"gemm.skinny": {8: 5, 64: 1}}}))
    variant = variant_record(made, custom, [ran])
    assert report.token_lines(variant) == [
        "tokens in a call of custom, calls in 2 processes:",
        "  gemm.cublaslt  17 to 64: 7, 1,025 to 4,096: 1,200",
        "  gemm.skinny    1 to 16: 105, 17 to 64: 1",
    ]
    assert variant.processes[0].tokens[11] == one


@pytest.mark.parametrize(
    ("counted", "says"),
    [
        (COUNTED, None),
        (
            COUNTED | {"lm_head": {"gemm.reference": 1}},
            "layer lm_head ran a custom kernel and matches",
        ),
        (
            COUNTED | {"model.layers.1.mlp.down_proj": {}},
            "1.mlp.down_proj did not run a custom kernel",
        ),
        ({"lm_head": {}}, None),
    ],
)
def test_what_the_patterns_say_is_what_ran_in_every_worker(
    counted: dict[str, dict[str, int]], says: str | None
) -> None:
    found = checks.layers(PATTERNS, "custom", result(layers={11: COUNTED, 12: counted}))
    assert (not found) if says is None else (len(found) == 1 and says in found[0])


def test_a_worker_that_names_no_layers_proves_nothing() -> None:
    launched = {11: {"gemm.reference": 61}, 12: {"gemm.reference": 61}}
    found = checks.layers(PATTERNS, "custom", result(launches=launched, layers={11: COUNTED}))
    assert found == ["custom: a process launched kernels and named no layers"]


def test_a_pattern_that_matches_no_layer_ends_the_run_in_one_line() -> None:
    counted = result(layers={11: COUNTED})
    require_matching_layers("*.mlp.*, lm_head", counted)
    with pytest.raises(WorkspaceError) as caught:
        require_matching_layers("*.mlp.*,*.mpl.*", counted)
    assert str(caught.value) == (
        "LAYERS: '*.mpl.*' matches none of the model's 5 layers; examples: "
        "lm_head, model.layers.0.mlp.down_proj, model.layers.0.self_attn.o_proj"
    )
