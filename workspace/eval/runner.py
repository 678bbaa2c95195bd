# SPDX-License-Identifier: Apache-2.0
"""The steps of `make eval`, in the order in which they happen."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from workspace.bench import models, processes
from workspace.bench import report as bench_report
from workspace.bench.guards import disk_errors_in_one_line, only_bench, signals_stop_engine
from workspace.bench.plan import check_memory, check_quantization, detect_device
from workspace.bench.record import write
from workspace.bench.runner import LOCK, LOGS, RUNS, remove_left, require_valid, slug
from workspace.bench.time_left import TimeLeft
from workspace.bench.variants import check_surroundings, engine_arguments, environment
from workspace.eval import report
from workspace.eval.evaluate import evaluate
from workspace.eval.messages import STAGES, ScoreJob, Scores
from workspace.eval.plan import Evaluation, prepare
from workspace.eval.record import Record
from workspace.host.files import remove_partial
from workspace.host.paths import RESULTS
from workspace.verbs import Eval

RECORDS = RESULTS / "eval"
"""Beside the records of benchmarks, which are compared and drawn as those of speeds."""


def run(options: Eval) -> Record:
    """Evaluate what `options` describe; its record, which is in a file, too.

    Raises:
        WorkspaceError: it could not be run, or a check failed; then the record says so, too.
    """
    with only_bench(LOCK), signals_stop_engine(), disk_errors_in_one_line():
        device = detect_device()
        check_quantization(options.quantization)
        check_surroundings()
        remove_partial(models.MODELS)
        bench_report.line("resolving the models …")
        evaluation = prepare(options, device)
        check_memory(evaluation.model.plan)
        report.announce(evaluation)
        started, load = datetime.now(UTC), os.getloadavg()[0]
        run_id = f"{started:%Y%m%d-%H%M%S}-{slug(evaluation.model.model.name)}-eval"
        remove_left(RUNS)
        against, model = score(evaluation, RUNS / run_id, LOGS / run_id)
        result = evaluate(evaluation, against, model, run_id, started, load)
        path = RECORDS / f"{run_id}.json"
        remove_partial(RECORDS)
        write(result, path)
        shutil.rmtree(RUNS / run_id, ignore_errors=True)
        report.show(result, path)
        require_valid(result.run, result.failures, path)
        return result


def score(evaluation: Evaluation, folder: Path, logs: Path) -> tuple[Scores, Scores]:
    """What both sides give to the windows, one process after the other.

    Args:
        folder: for the messages of the processes.
        logs: for a log of each process.

    Raises:
        WorkspaceError: a process failed.
    """
    sides = (evaluation.against, evaluation.model)
    names = [side.name for side in sides]
    done: list[Scores] = []
    clock = TimeLeft(evaluation.expected, evaluation.steps, names, STAGES)
    with bench_report.progress(names, clock) as progress:
        for side in sides:
            job = ScoreJob(
                arguments=engine_arguments(side.plan, side.variant),
                launches=folder / side.name / "launches",
                folder=folder / side.name,
                windows=evaluation.windows,
                at_once=evaluation.at_once,
            )
            progress.start()
            scores = processes.run_program(
                "workspace.eval.score",
                Scores,
                job,
                environment(side.plan, side.variant, job.launches),
                logs / f"{side.name}.log",
                progress.step,
                side.name,
            )
            progress.end(evaluation.steps)
            done.append(scores)
    against, model = done
    return against, model
