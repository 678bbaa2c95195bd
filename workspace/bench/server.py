# SPDX-License-Identifier: Apache-2.0
"""METRIC=serve: `vllm serve` in a process of its own, and `vllm bench serve` in this one.

Both speak HTTP over the loopback, and to nobody else. The log of the server is that of this
process, its workers are in this process's group, so that they end with it whatever happens.
"""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from workspace.bench import vllm_bench
from workspace.bench.messages import JOB, SERVER, Event, Generation, Job, Ran, Report, Step
from workspace.bench.record import Round, Served
from workspace.bench.variants import HOST

READY_SECONDS = 900.0
"""How long a server may take to answer: vLLM itself gives up on its engine after 600 s."""
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2
TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total\{.*\} (\S+)$", re.MULTILINE)
"""The engine's counters of tokens in the text of /metrics."""
TOKEN_ID = "token_id:"
"""What vLLM writes before an id in place of a token's text."""


class Server:
    """A server, from its start to its end, and the benchmark of its clients."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ready = False

    def start(self, report: Report) -> None:
        self._report = report
        with socket.create_server((HOST, 0)) as free:
            self._port = free.getsockname()[1]
        program = [sys.executable, "-m", "workspace.bench.server_run"]
        self._process = subprocess.Popen([*program, str(self._job.folder / JOB), str(self._port)])
        import vllm.benchmarks.serve  # noqa: F401 - takes as long as the server's own imports

        report(Event(stage="starting the engine"))

    def bench(self, seed: int) -> Round:
        if not self._ready:
            self._wait()
            self._report(Event(stage="warming up", number=1))
        name, before = f"vllm-{seed}.json", self._tokens()
        to = ["--host", HOST, "--port", str(self._port), "--ready-check-timeout-sec", "0"]
        to += ["--save-result", "--result-dir", str(self._job.folder), "--result-filename", name]
        vllm_bench.run("serve", [*self._job.arguments, "--seed", str(seed), *to])
        figures = json.loads((self._job.folder / name).read_text())
        if figures["completed"] != figures["num_prompts"]:
            self._require_running()
            answered = f"{figures['completed']} of {figures['num_prompts']}"
            raise RuntimeError(f"vLLM's server answered {answered} requests")
        return round_of(figures, seed, self._tokens() - before)

    def generate(self) -> list[Generation]:
        job = self._job
        request = {
            "prompt": job.prompts,
            "max_tokens": job.new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": job.top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return generations(json.loads(self._ask("/v1/completions", request)))

    def stop(self) -> Ran:
        self._process.terminate()
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"vLLM's server did not stop within {STOP_SECONDS:.0f} s") from None
        ran = self._job.folder / SERVER
        if not ran.is_file():
            raise RuntimeError(f"vLLM's server ended with status {status}")
        return Ran.model_validate_json(ran.read_text())

    def _wait(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it has ended, or takes too long.
        """
        end = time.monotonic() + READY_SECONDS
        while not self._ready:
            self._require_running(seconds=0)
            if time.monotonic() > end:
                raise RuntimeError(f"vLLM's server did not answer within {READY_SECONDS:.0f} s")
            with suppress(OSError):
                self._ask("/health")
                self._ready = True
            time.sleep(POLL_SECONDS)

    def _require_running(self, seconds: float = 10.0) -> None:
        """Raise if the server has ended, or does so within some seconds."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
            raise RuntimeError(f"vLLM's server ended with status {status}")

    def _tokens(self) -> int:
        """How many tokens the server's engine has processed, prompts and answers together."""
        return round(sum(map(float, TOKENS.findall(self._ask("/metrics")))))

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The server's answer.

        Raises:
            RuntimeError: an error is the answer, or the server has ended meanwhile.
            OSError: there is none.
        """
        connection = http.client.HTTPConnection(HOST, self._port)
        try:
            text = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("POST" if body else "GET", path, text, headers)
            answer = connection.getresponse()
            content = answer.read().decode()
        except (OSError, http.client.HTTPException):
            self._require_running(seconds=10.0 if self._ready else 0)
            raise
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise RuntimeError(f"vLLM's server answered {path} with {answer.status}: {content}")
        return content


def round_of(figures: dict[str, Any], seed: int, engine_tokens: int) -> Round:
    """A round from the file that `vllm bench serve` saves, whose token counts are those that the
    server gave with each answer; and from the engine's own count."""
    return Round(
        seed=seed,
        elapsed_s=figures["duration"],
        prompt_tokens=figures["total_input_tokens"],
        output_tokens=figures["total_output_tokens"],
        reported_tokens=engine_tokens,
        served=Served(
            requests_per_s=figures["request_throughput"],
            good_per_s=figures.get("request_goodput"),
            ttft_ms=figures["median_ttft_ms"],
            ttft_p99_ms=figures["p99_ttft_ms"],
            tpot_ms=figures["median_tpot_ms"],
            tpot_p99_ms=figures["p99_tpot_ms"],
        ),
    )


def generations(answer: dict[str, Any]) -> list[Generation]:
    """The greedy outputs in an answer of /v1/completions with token ids."""
    return [
        Generation(
            prompt=choice["prompt_token_ids"],
            steps=[
                Step(
                    token=token,
                    logprobs={int(k.removeprefix(TOKEN_ID)): value for k, value in top.items()},
                )
                for token, top in zip(
                    choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True
                )
            ],
        )
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
    ]
