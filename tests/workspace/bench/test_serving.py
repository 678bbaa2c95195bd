# SPDX-License-Identifier: Apache-2.0
"""METRIC=serve: its options, the figures that get verdicts, and what the server answers."""

from pathlib import Path
from typing import Any

import pytest

from tests.workspace.bench.samples import plan
from tests.workspace.bench.test_record import make
from workspace.bench import chart, record, report, server, serving, variants
from workspace.bench.measure import ProcessRun
from workspace.bench.record import Round, Served
from workspace.bench.variants import Variant
from workspace.host.errors import WorkspaceError
from workspace.host.options import read
from workspace.verbs import Bench

STOCK = Variant("stock")


def test_requests_come_at_once_or_at_a_rate() -> None:
    assert serving.request_rate(None) is None
    assert serving.request_rate("inf") is None
    assert serving.request_rate("2.5") == 2.5


@pytest.mark.parametrize("rate", ["fast", "0", "-1", "nan"])
def test_another_rate_is_one_line(rate: str) -> None:
    with pytest.raises(WorkspaceError, match=f"REQUEST_RATE={rate} is no number") as caught:
        serving.request_rate(rate)
    assert "\n" not in str(caught.value)


def test_limits_are_passed_on_as_vllm_takes_them() -> None:
    given = serving.goodput(" ttft:200  tpot:20.5 ")
    assert given == "ttft:200 tpot:20.5"
    words = variants.arguments(plan(metric="serve", goodput=given), STOCK)
    at = words.index("--goodput")
    assert words[at + 1 : at + 3] == ["ttft:200", "tpot:20.5"]
    assert words[at + 3].startswith("--")


@pytest.mark.parametrize(
    "given",
    ["", "ttft", "ttft:", "ttft:soon", "itl:5", "ttft:-1", "ttft:1 ttft:2", "ttft=5", "e2el:inf"],
)
def test_other_limits_are_one_line(given: str) -> None:
    with pytest.raises(WorkspaceError, match="use milliseconds for ttft, tpot, e2el") as caught:
        serving.goodput(given)
    assert "\n" not in str(caught.value)


def test_options_of_a_server_need_a_server() -> None:
    for variables in ({"REQUEST_RATE": "4"}, {"GOODPUT": "ttft:200", "METRIC": "latency"}):
        with pytest.raises(WorkspaceError, match="use METRIC=serve"):
            read(Bench, variables)
    read(Bench, {"REQUEST_RATE": "4", "METRIC": "serve"})


@pytest.mark.parametrize(
    ("output_len", "rate", "first"),
    [(4, None, serving.RATE), (4, 2.0, serving.EACH), (1, 2.0, serving.FIRST)],
)
def test_the_verdict_is_about_what_the_kernels_decide(
    output_len: int, rate: float | None, first: serving.Kind
) -> None:
    kinds = serving.kinds(output_len, rate, "ttft:200")
    assert kinds[0] == first
    assert len(kinds) == len(set(kinds))
    assert {serving.RATE, serving.FIRST, serving.FIRST_99, serving.GOOD} <= set(kinds)
    assert (serving.EACH in kinds) == (output_len > 1)


def test_the_server_listens_on_the_loopback_and_its_clients_meet_no_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    made = plan(metric="serve", request_rate=4.0)
    given = variants.environment(made, STOCK, Path("launches"))
    assert given["no_proxy"] == "127.0.0.1"
    assert "VLLM_API_KEY" not in given
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in variants.common_settings(made)
    serve, bench = variants.command_line(made, STOCK).split(" & ")
    assert serve.endswith(" --host 127.0.0.1")
    assert " vllm serve m --tokenizer t " in serve
    assert "--no-enable-prefix-caching" in serve
    assert " --request-rate 4 " in bench


def serve(slower: float = 1.0, good: float | None = None) -> list[Round]:
    """Rounds of a server; `slower` stretches all of its times."""
    return [
        Round(
            seed=seed,
            elapsed_s=second * slower,
            prompt_tokens=24,
            output_tokens=12,
            reported_tokens=36,
            served=Served(
                requests_per_s=3 / second / slower,
                good_per_s=good,
                ttft_ms=100 * second * slower,
                ttft_p99_ms=200 * second * slower,
                tpot_ms=10 * second * slower,
                tpot_p99_ms=11 * second * slower,
            ),
        )
        for seed, second in enumerate((1.0, 1.01, 1.02))
    ]


def served(slower: float = 1.3, good: float | None = None, **settings: Any) -> record.Record:
    """A run in which the custom variant took so many times as long."""

    def change(done: list[ProcessRun]) -> None:
        for run in done:
            run.result.rounds[:] = serve(slower if run.variant.launches else 1.0, good)

    return make(change, metric="serve", **settings)


def test_all_requests_at_once_are_compared_by_their_rate() -> None:
    made = served()
    assert made.failures == []
    assert (made.measured, made.comparison.verdict) == ("requests served, requests/s", "slower")
    assert made.comparison.ratio == pytest.approx(1 / 1.3)
    names = {figure.name: figure for figure in made.figures}
    first = names["time to first token, median"]
    assert first.medians == pytest.approx([101, 131.3])
    assert first.comparison is not None
    assert (first.comparison.verdict, first.unit) == ("slower", "ms")
    assert len(names) == 4
    assert all(
        value.comparison and value.comparison.verdict == "slower" for value in names.values()
    )


def test_requests_at_a_rate_are_compared_by_their_tokens() -> None:
    made = served(slower=0.7, request_rate=2.5)
    assert (made.unit, made.comparison.verdict) == ("ms", "faster")
    assert made.variants[0].median == pytest.approx(10.1)
    assert made.settings.request_rate == 2.5
    assert " REQUEST_RATE=2.5 " in made.command


def test_no_request_within_the_limits_has_no_ratio() -> None:
    (good,) = [one for one in served(good=0.0, goodput="ttft:1").figures if "GOODPUT" in one.name]
    assert good.comparison is None
    assert good.medians == [0.0, 0.0]
    made = served(good=2.0, goodput="ttft:1")
    assert made.figures[-1].comparison is not None
    assert " GOODPUT=ttft:1 " in made.command


def test_a_server_that_counted_other_tokens_makes_the_run_invalid() -> None:
    def miscount(done: list[ProcessRun]) -> None:
        for run in done:
            run.result.rounds[:] = serve()
        done[1].result.rounds[0].reported_tokens = 35

    (failure,) = make(miscount, metric="serve").failures
    assert failure == "custom (process 2), round 1: vLLM reports 35 tokens, not 36"


def test_every_figure_is_shown_with_its_verdict_and_drawn(tmp_path: Path) -> None:
    made = served(goodput="ttft:1", good=0.0)
    record.write(made, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == made
    lines = report.figure_lines(made)
    assert "3 requests, of which the 99th percentile is nearly the slowest" in lines[0]
    assert "stock 101, custom 131 ms, ratio" in lines[1]
    assert "slower" in lines[1]
    assert "ratio" not in lines[-1]
    assert "\n".join(lines) in list(report.lines(made))
    assert "3 requests at once" in str(report.table(made).caption)
    chart.draw(made, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


ANSWER = {
    "choices": [
        {
            "index": 1,
            "prompt_token_ids": [3],
            "token_ids": [5],
            "logprobs": {"top_logprobs": [{"token_id:5": -0.5, "token_id:2": -1.5}]},
        },
        {
            "index": 0,
            "prompt_token_ids": [1, 2],
            "token_ids": [9],
            "logprobs": {"top_logprobs": [{"token_id:9": 0.0, "token_id:4": -9999.0}]},
        },
    ]
}
"""What the tests read of an answer of /v1/completions."""


def test_outputs_are_read_by_token_ids_in_the_order_of_the_prompts() -> None:
    first, second = server.generations(ANSWER)
    assert (first.prompt, second.prompt) == ([1, 2], [3])
    assert first.steps[0].logprobs == {9: 0.0, 4: -9999.0}
    assert second.steps[0].token == 5


def test_the_engines_tokens_are_those_of_its_counters() -> None:
    text = (
        "# TYPE vllm:prompt_tokens counter\n"
        'vllm:prompt_tokens_total{engine="0",model_name="m"} 1024.0\n'
        'vllm:prompt_tokens_created{engine="0",model_name="m"} 1.79e+09\n'
        'vllm:prompt_tokens_by_source_total{engine="0",source="local"} 1024.0\n'
        'vllm:generation_tokens_total{engine="0",model_name="m"} 512.0\n'
    )
    assert sum(map(float, server.TOKENS.findall(text))) == 1536
