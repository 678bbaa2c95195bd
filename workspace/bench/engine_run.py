# SPDX-License-Identifier: Apache-2.0
"""One variant in a process of its own: vLLM's `vllm bench`, several rounds in one engine.

Run as `python -m workspace.bench.engine_run JOB.json` (see `Job`); writes `Result` as JSON when
all is done and a line per step to the job's events file before that.

Each round parses the arguments with vLLM's own parser and calls the entry point of `vllm bench
throughput|latency`. What differs from calling it anew each time: `vllm.LLM` is replaced by
`KeptEngine`, so that the rounds share one engine start, and the tokens of every request are
counted. Rounds before the engine is warm are not part of the result (see `_warm_up`). At the end
the same engine generates greedily for the comparison of outputs.
"""

import hashlib
import importlib
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Literal, Protocol

from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict

from workspace.bench.models import DUMMY_FORMAT
from workspace.bench.plan import Metric
from workspace.host.files import write_file

Stage = Literal[
    "importing vLLM",
    "starting the engine",
    "warming up",
    "round",
    "comparing outputs",
    "stopping",
]
"""What a process does, in this order."""

WARM_ROUNDS = (2, 8)
"""At least and at most so many rounds warm up."""
WARM_GAIN = 1.1
"""Warm is an engine whose round is not 1.1 times faster than the one before."""


class Job(BaseModel):
    """What the process is to do.

    `arguments` go to `vllm bench METRIC`; `--seed` and `--output-json` are added per round.
    `prompts` are texts or token ids for the comparison of outputs. Where `seconds` are given, no
    further round begins that would end later than so long after the start of the process, but
    `fewest_rounds` are measured all the same.
    """

    metric: Metric
    arguments: list[str]
    rounds: int
    fewest_rounds: int = 1
    seconds: float | None = None
    seed: int
    prompts: list[str] | list[list[int]]
    new_tokens: int
    top: int
    launches: Path
    folder: Path


class Event(BaseModel):
    """A step begins: its stage and, of rounds, the number and how many there are at most."""

    stage: Stage
    number: int = 0
    of: int = 0

    def __str__(self) -> str:
        number = f" {self.number}" if self.number else ""
        return f"{self.stage}{number}{f' of {self.of}' if self.of else ''}"


class Round(BaseModel):
    """One timed call of vLLM's benchmark: its figures, and the tokens of the request outputs."""

    seed: int
    elapsed_s: float
    prompt_tokens: int
    output_tokens: int
    reported_tokens: int | None
    """vLLM's own total; its latency benchmark does not report one."""


class Step(BaseModel):
    """One generated token: the choice, and log-probabilities of the likeliest tokens and it."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    token: int
    logprobs: dict[int, float]


class Generation(BaseModel):
    """Greedy output for one prompt."""

    prompt: list[int]
    steps: list[Step]


class Result(BaseModel):
    """What the process saw."""

    engine_start_s: float
    rounds: list[Round]
    generations: list[Generation]
    launches: dict[int, dict[str, int]]
    layers: dict[int, dict[str, dict[str, int]]]
    """Launches by process and layer; layers that launched nothing are there, and empty."""
    kernels_source_hash: str
    environment: dict[str, str]
    vllm_folder: str
    vllm_files: str
    """A hash over the names, sizes and times of vLLM's Python files when the process began."""
    modules: dict[str, str]
    """Modules at the top level that were imported, and the file of each."""
    packages: dict[str, str]
    """Every distribution that the process sees, and its version."""
    dtype: str
    """What the engine computes in; it need not be the configuration's dtype."""
    warm_up: list[Round]


class Say(Protocol):
    """Tells the parent process that a step begins."""

    def __call__(self, stage: Stage, number: int = 0, of: int = 0) -> None: ...


def main() -> None:
    begin = time.monotonic()
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    deadline = math.inf if job.seconds is None else begin + job.seconds
    _die_with_parent()
    say = _events(job.folder / "events.jsonl")

    say("importing vLLM")
    import vllm

    vllm_folder = Path(vllm.__file__).parent
    vllm_files = _files(vllm_folder)
    if DUMMY_FORMAT in job.arguments:  # vLLM checks the name in this process, too
        importlib.import_module("workspace.bench.dummy_weights")
    engine = KeptEngine(vllm.LLM, lambda: say("warming up", 1))
    vllm.LLM = engine

    say("starting the engine")
    begin = time.perf_counter()
    first = _bench(job, engine, job.seed)
    start_s = time.perf_counter() - begin

    def bench(seed: int) -> Round:
        return _bench(job, engine, seed)

    warm_up = _warm_up(job, bench, first, say, deadline)
    rounds = _rounds(job, bench, say, deadline)

    say("comparing outputs")
    generations = _generate(job, engine)

    # Imported in the stock variant too: that it could have run the kernels is part of the proof.
    from custom_kernels import build, launches

    result = Result(
        engine_start_s=start_s,
        warm_up=warm_up,
        rounds=rounds,
        generations=generations,
        launches=launches.read(job.launches),
        layers=launches.read_layers(job.launches),
        kernels_source_hash=build.source_hash(),
        environment=_environment(),
        dtype=str(engine.llm.llm_engine.model_config.dtype).removeprefix("torch."),
        vllm_folder=str(vllm_folder),
        vllm_files=vllm_files,
        modules=_modules(),
        packages=_packages(),
    )
    write_file(job.folder / "result.json", result.model_dump_json().encode())
    say("stopping")


class KeptEngine:
    """Stands in for the class `vllm.LLM`: builds one engine, gives the same one ever after.

    `built` is called once it is there. Its `generate` counts tokens. It also folds token ids into
    the vocabulary, because vLLM's latency benchmark draws ids below 10000 whatever the model.
    """

    def __init__(self, llm_class: Any, built: Callable[[], None] = lambda: None) -> None:
        self._class = llm_class
        self._built = built
        self._llm: Any = None
        self.prompt_tokens = 0
        self.output_tokens = 0

    def from_engine_args(self, engine_args: Any) -> Any:
        return self._keep(lambda: self._class.from_engine_args(engine_args))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._keep(lambda: self._class(*args, **kwargs))

    def _keep(self, build: Any) -> Any:
        if self._llm is None:
            self._llm = build()
            vocab = self._llm.llm_engine.model_config.get_vocab_size()
            original = self._llm.generate

            def generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
                for prompt in prompts:
                    if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
                        ids = prompt["prompt_token_ids"]
                        if max(ids) >= vocab:
                            prompt["prompt_token_ids"] = [i % vocab for i in ids]
                outputs = original(prompts, *args, **kwargs)
                self.prompt_tokens += sum(len(o.prompt_token_ids or ()) for o in outputs)
                self.output_tokens += sum(len(c.token_ids) for o in outputs for c in o.outputs)
                return outputs

            self._llm.generate = generate
            self._built()
        return self._llm

    @property
    def llm(self) -> Any:
        if self._llm is None:
            raise RuntimeError("vLLM's benchmark did not build its engine through vllm.LLM")
        return self._llm


def _bench(job: Job, engine: KeptEngine, seed: int) -> Round:
    """One call of vLLM's benchmark with the prompts of `seed`."""
    import numpy as np
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if job.metric == "throughput":
        from vllm.entrypoints.cli.benchmark.throughput import (
            BenchmarkThroughputSubcommand as Benchmark,
        )
    else:
        from vllm.entrypoints.cli.benchmark.latency import (
            BenchmarkLatencySubcommand as Benchmark,
        )
    parser = FlexibleArgumentParser(prog=f"vllm bench {job.metric}")
    Benchmark.add_cli_args(parser)
    report = job.folder / f"vllm-{seed}.json"
    arguments = [*job.arguments, "--seed", str(seed), "--output-json", str(report)]
    np.random.seed(seed)  # vLLM's latency benchmark draws its prompts from numpy's global state
    engine.prompt_tokens = engine.output_tokens = 0
    Benchmark.cmd(parser.parse_args(arguments))
    figures = json.loads(report.read_text())
    latency = figures.get("latencies")
    return Round(
        seed=seed,
        elapsed_s=latency[0] if latency else figures["elapsed_time"],
        prompt_tokens=engine.prompt_tokens,
        output_tokens=engine.output_tokens,
        reported_tokens=figures.get("total_num_tokens"),
    )


def _warm_up(
    job: Job, bench: Callable[[int], Round], first: Round, say: Say, deadline: float
) -> list[Round]:
    """Rounds until they stop getting faster: code is still compiled after the first of them.

    More than the fewest only where the rounds to measure still end before the deadline.
    """
    done = [first]
    fewest, most = WARM_ROUNDS
    while len(done) < most:
        say("warming up", len(done) + 1)
        done.append(bench(job.seed + 1000 + len(done)))
        if len(done) >= fewest and done[-1].elapsed_s * WARM_GAIN >= done[-2].elapsed_s:
            break
        if time.monotonic() + (1 + job.rounds) * done[-1].elapsed_s > deadline:
            break
    return done


def _rounds(job: Job, bench: Callable[[int], Round], say: Say, deadline: float) -> list[Round]:
    """The measured rounds: as many as asked for, or as end before the deadline.

    How many there are is settled by the clock alone, never by what the rounds show.
    """
    done: list[Round] = []
    slowest = 0.0
    for number in range(1, job.rounds + 1):
        begin = time.monotonic()
        if number > job.fewest_rounds and begin + slowest > deadline:
            break
        say("round", number, job.rounds)
        done.append(bench(job.seed + number))
        slowest = max(slowest, time.monotonic() - begin)
    return done


def _generate(job: Job, engine: KeptEngine) -> list[Generation]:
    """Greedy generation with the log-probabilities of the likeliest tokens at each step."""
    from vllm import SamplingParams

    prompts: list[Any] = [
        prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        for prompt in job.prompts
    ]
    greedy = SamplingParams(
        temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True, logprobs=job.top
    )
    generations = []
    for output in engine.llm.generate(prompts, greedy, use_tqdm=False):
        completion = output.outputs[0]
        steps = [
            Step(token=token, logprobs={i: entry.logprob for i, entry in logprobs.items()})
            for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        generations.append(Generation(prompt=output.prompt_token_ids, steps=steps))
    return generations


def _files(folder: Path) -> str:
    stats = ((str(path), path.stat()) for path in sorted(folder.rglob("*.py")))
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _modules() -> dict[str, str]:
    # The engine's other processes are made from this one, with its module path.
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return {k: file for k, file in files.items() if file and "." not in k and k != "__main__"}


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for one in distributions():  # in the order of the module path: the first counts
        found.setdefault(canonicalize_name(one.metadata["Name"]), one.version)
    return found


def _environment() -> dict[str, str]:
    """Versions and device, as the engine's process sees them."""
    import torch
    from vllm.platforms import current_platform

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("vllm", "triton", "transformers", "custom-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = str(torch.version.cuda or "none")
    found["platform"] = current_platform.device_type
    if current_platform.device_type != "cpu":
        found["device"] = current_platform.get_device_name()
    return found


def _events(path: Path) -> Say:
    """A function that appends a step to the events file, where the parent process reads it."""

    def say(stage: Stage, number: int = 0, of: int = 0) -> None:
        with path.open("a") as file:
            file.write(Event(stage=stage, number=number, of=of).model_dump_json() + "\n")

    return say


def _die_with_parent() -> None:
    """End the whole process group, workers included, when the bench process is gone.

    The group is ours: the parent starts this process as the leader of a new session.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
