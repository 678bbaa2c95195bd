# SPDX-License-Identifier: Apache-2.0
"""The process of one variant: vLLM's `vllm bench`, several rounds in one engine.

Run as `python -m workspace.bench.engine_run JOB.json` (see workspace.bench.messages). Each round
parses the arguments with vLLM's own parser and calls the entry point of `vllm bench METRIC`; unlike
separate calls, the rounds share one engine start: that of a server (see `Server`), or of an engine
in this process (see `KeptEngine`). Rounds before the engine is warm are not part of the result. At
the end the same engine generates greedily for the comparison of outputs.
"""

import functools
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from workspace.bench import loaded, vllm_bench
from workspace.bench.messages import (
    EVENTS,
    EXECUTOR,
    RESULT,
    WARM_ROUNDS,
    WORKER_EXTENSION,
    EngineJob,
    Event,
    Generation,
    Job,
    Ran,
    Report,
    Result,
    Step,
)
from workspace.bench.models import DUMMY_FORMAT
from workspace.bench.record import Round
from workspace.bench.server import Server
from workspace.host.files import write_file

WARM_GAIN = 1.1
"""An engine is warm when a round is not 1.1 times faster than the one before."""


class Engine(Protocol):
    """What runs the rounds of a job."""

    def start(self, report: Report) -> None:
        """Start it, or at least so far that the first round does."""

    def bench(self, seed: int) -> Round:
        """One call of vLLM's benchmark with the prompts of `seed`."""
        ...

    def generate(self) -> list[Generation]:
        """Greedy generation with the log-probabilities of the likeliest tokens at each step."""
        ...

    def stop(self) -> Ran:
        """Stop it; what it ran."""
        ...


class KeptEngine:
    """Replaces the class `vllm.LLM`: builds one engine, then returns the same.

    Its `generate` counts the tokens of every request. It also folds token ids into the vocabulary,
    because vLLM's latency benchmark draws ids below 10000 for any model.

    Args:
        llm_class: `vllm.LLM`.
        built: called once the engine is built.
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

    def _keep(self, build: Callable[[], Any]) -> Any:
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


class InProcess:
    """The engine of `vllm bench throughput|latency`, in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start(self, report: Report) -> None:
        import vllm

        self._vllm_files = loaded.files_hash(Path(vllm.__file__).parent)
        know_dummy_weights(self._job.arguments)
        self._engine = KeptEngine(vllm.LLM, lambda: report(Event(stage="warming up", number=1)))
        vllm.LLM = self._engine
        report(Event(stage="starting the engine"))

    def bench(self, seed: int) -> Round:
        import numpy as np

        output = self._job.folder / f"vllm-{seed}.json"
        arguments = [*self._job.arguments, "--seed", str(seed), "--output-json", str(output)]
        np.random.seed(seed)  # noqa: NPY002 - vLLM's latency benchmark draws its prompts from numpy's global state
        engine = self._engine
        engine.prompt_tokens = engine.output_tokens = 0
        vllm_bench.run(self._job.metric, arguments)
        figures = json.loads(output.read_text())
        latency = figures.get("latencies")
        return Round(
            seed=seed,
            elapsed_s=latency[0] if latency else figures["elapsed_time"],
            prompt_tokens=engine.prompt_tokens,
            output_tokens=engine.output_tokens,
            reported_tokens=figures.get("total_num_tokens"),
        )

    def generate(self) -> list[Generation]:
        from vllm import SamplingParams

        job = self._job
        prompts: list[Any] = [
            prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            for prompt in job.prompts
        ]
        greedy = SamplingParams(
            temperature=0.0, max_tokens=job.new_tokens, ignore_eos=True, logprobs=job.top
        )
        generations = []
        for output in self._engine.llm.generate(prompts, greedy, use_tqdm=False):
            completion = output.outputs[0]
            steps = [
                Step(token=token, logprobs={i: entry.logprob for i, entry in logprobs.items()})
                for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
            generations.append(Generation(prompt=output.prompt_token_ids, steps=steps))
        return generations

    @property
    def llm(self) -> Any:
        """vLLM's `LLM`, once it is built."""
        return self._engine.llm

    def stop(self) -> Ran:
        llm = self.llm
        ran = what_ran(self._job, llm.llm_engine.model_config, self._vllm_files)
        if WORKER_EXTENSION in self._job.arguments:
            ran.attention = llm.collective_rpc("attention_backends")[0]
        if EXECUTOR in self._job.arguments:  # the logs of other hosts are in their own files
            counted = dict(enumerate(llm.collective_rpc("launched")))
            ran.launches = {rank: of for rank, (of, _, _) in counted.items() if of}
            ran.layers = {rank: of for rank, (_, of, _) in counted.items() if of}
            ran.tokens = {rank: of for rank, (_, _, of) in counted.items() if of}
        return ran


def main() -> None:
    begin = time.monotonic()
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    deadline = math.inf if job.seconds is None else begin + job.seconds
    end_with_parent()
    report = functools.partial(write_event, job.folder)
    report(Event(stage="importing vLLM"))
    engine: Engine = Server(job) if job.metric == "serve" else InProcess(job)
    engine.start(report)
    begin = time.perf_counter()
    first = engine.bench(job.seed)
    start_s = time.perf_counter() - begin

    warm_up = _warm_up(job, engine.bench, first, report, deadline)
    rounds = _rounds(job, engine.bench, report, deadline)

    report(Event(stage="comparing outputs"))
    generations = engine.generate()

    report(Event(stage="stopping"))
    result = Result(
        engine_start_s=start_s,
        warm_up=warm_up,
        rounds=rounds,
        generations=generations,
        **dict(engine.stop()),
    )
    write_file(job.folder / RESULT, result.model_dump_json().encode())


def know_dummy_weights(arguments: Sequence[str]) -> None:
    """Register the load format in this process, too, if vLLM will check its name here."""
    if DUMMY_FORMAT in arguments:
        importlib.import_module("workspace.bench.dummy_weights")


def llm_of(arguments: Sequence[str]) -> Any:
    """The engine that `vllm serve` and `vllm bench` would start with these arguments."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    return vllm.LLM(**vars(EngineArgs.from_cli_args(parser.parse_args(arguments))))


def write_event(folder: Path, event: Event) -> None:
    """Tell the parent process that a step begins."""
    with (folder / EVENTS).open("a") as file:
        file.write(event.model_dump_json() + "\n")


def what_ran(job: EngineJob, model: Any, vllm_files: str) -> Ran:
    """Launches, sources and versions of this process and its workers.

    Args:
        model: vLLM's `ModelConfig`.
        vllm_files: `loaded.files_hash` of vLLM's folder when the process began.
    """
    import vllm

    # Imported by stock too: the proof includes that it could have run the kernels.
    from custom_kernels import launches
    from custom_kernels.source_hash import source_hash

    packages = loaded.packages()
    return Ran(
        launches=launches.read(job.launches),
        layers=launches.read_layers(job.launches),
        tokens=launches.read_tokens(job.launches),
        kernels_source_hash=source_hash(),
        environment=loaded.versions(packages),
        dtype=str(model.dtype).removeprefix("torch."),
        vllm_folder=str(Path(vllm.__file__).parent),
        vllm_files=vllm_files,
        modules=loaded.modules(),
        packages=packages,
    )


def _warm_up(
    job: Job, bench: Callable[[int], Round], first: Round, report: Report, deadline: float
) -> list[Round]:
    """Rounds until they stop getting faster: code is still compiled after the first.

    More than the fewest only if the measured rounds still end before the deadline.
    """
    done = [first]
    fewest, most = WARM_ROUNDS
    while len(done) < most:
        report(Event(stage="warming up", number=len(done) + 1))
        done.append(bench(job.seed + 1000 + len(done)))
        if len(done) >= fewest and done[-1].elapsed_s * WARM_GAIN >= done[-2].elapsed_s:
            break
        if time.monotonic() + (1 + job.rounds) * done[-1].elapsed_s > deadline:
            break
    return done


def _rounds(
    job: Job, bench: Callable[[int], Round], report: Report, deadline: float
) -> list[Round]:
    """The measured rounds: all of the job, or as many as end before the deadline.

    Their number depends on the clock alone, never on what the rounds measure.
    """
    done: list[Round] = []
    slowest = 0.0
    for number in range(1, job.rounds + 1):
        begin = time.monotonic()
        if number > job.fewest_rounds and begin + slowest > deadline:
            break
        report(Event(stage="round", number=number, of=job.rounds))
        done.append(bench(job.seed + number))
        slowest = max(slowest, time.monotonic() - begin)
    return done


def end_with_parent() -> None:
    """Kill the whole process group, workers included, when the bench process is gone.

    The parent starts this process as the leader of a new session, so the group has nothing else.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
