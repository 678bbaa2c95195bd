# SPDX-License-Identifier: Apache-2.0
"""Engine processes: what went wrong in one line, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.workspace.conftest import still_running
from workspace.bench import processes
from workspace.bench.messages import Job, Result
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT


def job(folder: Path) -> Job:
    return Job(
        metric="throughput",
        arguments=["--model", str(folder / "nothing-here")],
        rounds=1,
        seed=1,
        prompts=[[1]],
        new_tokens=1,
        top=1,
        launches=folder / "launches",
        folder=folder / "run",
    )


def test_a_process_that_fails_is_one_line_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "1-stock.log"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "", "PYTHONHOME": str(tmp_path)}
    with pytest.raises(WorkspaceError) as caught:  # an interpreter without its library
        processes.run(job(tmp_path), environment, log, lambda _: None, "stock")
    assert str(caught.value).startswith("stock: ")
    assert str(log) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("needs", "patience"), [(1, 60.0), (600, 0.5)])
def test_workers_may_end_by_themselves_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: int, patience: float
) -> None:
    """A stand-in for an engine that ends before its worker, which tidies up or hangs."""
    (tmp_path / "worker.py").write_text(f"import time; time.sleep({needs}); open('tidied', 'w')")
    (tmp_path / "engine.py").write_text(
        "import os, subprocess, sys\n"
        "os.chdir(os.environ['FOLDER'])\n"
        "print(subprocess.Popen([sys.executable, 'worker.py']).pid, file=open('pid', 'w'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FOLDER": str(tmp_path)}
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", patience)
    with pytest.raises(WorkspaceError):  # it answers nothing
        processes.run_program(
            "engine", Result, job(tmp_path), environment, tmp_path / "log", lambda _: None, "stock"
        )
    assert (tmp_path / "tidied").exists() == (needs < patience)
    with suppress(psutil.NoSuchProcess):
        assert still_running([psutil.Process(int((tmp_path / "pid").read_text()))]) == []


def test_a_killed_bench_takes_its_engine_along(tmp_path: Path) -> None:
    """A stand-in for the engine: it starts a child as vLLM does and watches its parent."""
    engine = tmp_path / "engine.py"
    engine.write_text(
        "import subprocess, sys, time\n"
        "from workspace.bench.engine_run import end_with_parent\n"
        "end_with_parent()\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').close()\n"
        "time.sleep(600)\n"
    )
    started = tmp_path / "started"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\n"
            "subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)",
            str(engine),
            str(started),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wait_for(started.exists)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    alive = still_running(children)
    assert alive == []


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)
