# SPDX-License-Identifier: Apache-2.0
"""The process of one side: the log-probabilities that vLLM's engine gives to the tokens of a text.

Run as `python -m workspace.eval.score JOB.json` (see workspace.eval.messages).
"""

import functools
import sys
from pathlib import Path
from typing import Any

from workspace.bench import loaded
from workspace.bench.engine_run import end_with_parent, llm_of, what_ran, write_event
from workspace.bench.messages import RESULT, Event
from workspace.eval.messages import ScoreJob, Scores
from workspace.host.files import write_file


def main() -> None:
    job = ScoreJob.model_validate_json(Path(sys.argv[1]).read_text())
    end_with_parent()
    report = functools.partial(write_event, job.folder)
    report(Event(stage="importing vLLM"))
    import vllm

    vllm_files = loaded.files_hash(Path(vllm.__file__).parent)
    report(Event(stage="starting the engine"))
    llm = llm_of(job.arguments)

    logprobs: list[list[float]] = []
    starts = range(0, len(job.windows), job.at_once)
    for number, start in enumerate(starts, 1):
        report(Event(stage="scoring", number=number, of=len(starts)))
        logprobs += score(llm, job.windows[start : start + job.at_once])
    ran = what_ran(job, llm.llm_engine.model_config, vllm_files)
    result = Scores(logprobs=logprobs, **dict(ran))
    write_file(job.folder / RESULT, result.model_dump_json().encode())
    report(Event(stage="stopping"))


def score(llm: Any, windows: list[list[int]]) -> list[list[float]]:
    """For each window the log-probability of each token but the first, given those before it."""
    from vllm import SamplingParams

    # 0: of the token that is there, and of none beside it. The engine has to make one token.
    only_prompt = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompts: list[Any] = [{"prompt_token_ids": window} for window in windows]
    return [
        [
            given[token].logprob
            for token, given in zip(window[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for window, output in zip(
            windows, llm.generate(prompts, only_prompt, use_tqdm=False), strict=True
        )
    ]


if __name__ == "__main__":
    main()
