# SPDX-License-Identifier: Apache-2.0
"""The process of one variant: a few steps of vLLM's engine under its own profiler.

Run as `python -m workspace.trace.engine JOB.json` (see workspace.trace.messages).
"""

import functools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from workspace.bench import loaded
from workspace.bench.engine_run import (
    end_with_parent,
    know_dummy_weights,
    llm_of,
    what_ran,
    write_event,
)
from workspace.bench.messages import RESULT, Event
from workspace.host.files import write_file
from workspace.trace.messages import Traced, TraceJob

WARM_UP = 2
"""Rounds before the trace: what is compiled or tuned at first use is no part of a step."""


def main() -> None:
    job = TraceJob.model_validate_json(Path(sys.argv[1]).read_text())
    end_with_parent()
    report = functools.partial(write_event, job.folder)
    report(Event(stage="importing vLLM"))
    import vllm

    vllm_files = loaded.files_hash(Path(vllm.__file__).parent)
    know_dummy_weights(job.arguments)
    report(Event(stage="starting the engine"))
    profiler = ["--profiler-config", json.dumps(profiler_settings(job.traces))]
    llm = llm_of([*job.arguments, *profiler])

    run = functools.partial(generate, llm, job)
    for number in range(WARM_UP):
        report(Event(stage="warming up", number=number + 1))
        run(seed=number)
    llm.collective_rpc("name_layers_in_traces", kwargs={"eager": job.eager})
    untraced_s = [run(seed=WARM_UP + number) for number in range(WARM_UP)][-1]
    report(Event(stage="tracing"))
    llm.start_profile()
    traced_s = run(seed=2 * WARM_UP)
    llm.stop_profile()
    linear = llm.collective_rpc("linear_layers")[0]
    ran = what_ran(job, llm.llm_engine.model_config, vllm_files)
    report(Event(stage="stopping"))
    rates = llm.collective_rpc("ceilings", args=(job.dtypes,))[0] if job.dtypes else {}
    traces = sorted(job.traces.glob("*rank*.json*"))
    if not traces:
        raise RuntimeError(f"vLLM's profiler wrote no trace into {job.traces}")
    result = Traced(
        traces=traces,
        untraced_s=untraced_s,
        traced_s=traced_s,
        linear=linear,
        bytes_per_second=rates.get("bytes_per_second"),
        flops_per_second=rates.get("flops_per_second", {}),
        **dict(ran),
    )
    write_file(job.folder / RESULT, result.model_dump_json().encode())


def profiler_settings(folder: Path) -> dict[str, Any]:
    """Kernels and ops with their names; no Python stacks, which slow a step down several times."""
    return {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }


def generate(llm: Any, job: TraceJob, seed: int) -> float:
    """Continue fresh random prompts, all at once, by the same number of tokens; the seconds."""
    from vllm import SamplingParams

    drawn = random.Random(seed)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts: list[Any] = [
        {"prompt_token_ids": [drawn.randrange(vocabulary) for _ in range(job.input_len)]}
        for _ in range(job.requests)
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, greedy, use_tqdm=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
