# SPDX-License-Identifier: Apache-2.0
"""The process of `make capture`: one engine of vLLM, rounds to warm up, and one that counts.

Run as `python -m workspace.capture.engine JOB.json` (see workspace.bench.messages).
"""

import functools
import sys
from pathlib import Path

from workspace.bench import engine_run
from workspace.bench.messages import RESULT, Event, Job, Ran
from workspace.bench.record import Round
from workspace.host.files import write_file


class Captured(Ran):
    """What the process ran in the round that counts."""

    rounds: list[Round]


def main() -> None:
    from custom_kernels.vllm.capture import METHOD

    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    engine_run.end_with_parent()
    report = functools.partial(engine_run.write_event, job.folder)
    report(Event(stage="importing vLLM"))
    engine = engine_run.InProcess(job)
    engine.start(report)
    engine.bench(job.seed)

    engine.llm.collective_rpc(METHOD, args=("clear",))
    report(Event(stage="round", number=1, of=1))
    done = engine.bench(job.seed + 1)
    engine.llm.collective_rpc(METHOD, args=("write",))

    report(Event(stage="stopping"))
    result = Captured(rounds=[done], **dict(engine.stop()))
    write_file(job.folder / RESULT, result.model_dump_json().encode())


if __name__ == "__main__":
    main()
