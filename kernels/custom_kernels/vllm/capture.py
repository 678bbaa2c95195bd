# SPDX-License-Identifier: Apache-2.0
"""Which shapes a worker of vLLM runs, and how often: `CUSTOM_KERNELS_CAPTURE=<folder>`.

Under torch.compile and CUDA graphs no Python of a layer runs in a step. But a layer's shape is that
of its weights, which is known when the model is loaded, times the number of rows, which is known
for each step of the engine. So a worker describes its layers once and counts its steps, which costs
a few microseconds each; layers times steps are the calls.

Each worker keeps a file in the folder, which is rewritten every few seconds and at the end:

    {"schema_version": 1, "worker": "4711-0", "rank": 0, "vllm": …, "device": …, "dtype": …,
     "model": …, "started": …,
     "layers": [{"operation": "gemm", "rows": "outputs", "shape": {"N": …, "K": …, "bias": false},
                 "method": null, "names": ["lm_head"]}, …],
     "left_out": {"FusedMoE": ["model.layers.0.mlp.experts", …]},
     "scheduled": 4096, "tokens": {"64": 31}, "outputs": {"64": 31}, "decodes": [[64, 120, 30], …]}

`rows` says which of the three histograms has a layer's M: `tokens` of a step, padded to a CUDA
graph where it replays one; `outputs`, the rows that the output head multiplies; `decodes`, the
steps in which every sequence has one token: the number of sequences, the bucket (see ``buckets``)
of their mean length, and how often. `scheduled` is the sum of all tokens, without padding.
"""

import atexit
import datetime
import itertools
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from custom_kernels.buckets import bucket

log = logging.getLogger(__name__)

ENVIRONMENT = "CUSTOM_KERNELS_CAPTURE"
METHOD = "captured_steps"
"""Of every worker: `LLM.collective_rpc(METHOD, args=("clear",))` forgets its steps so far, and
`"write"` writes its file."""
SECONDS = 2.0
"""Between two versions of the file."""

_numbers = itertools.count()


class Steps:
    """The steps of one worker, counted and written.

    Args:
        folder: for the file.
        about: what the file says of the worker and its layers.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        name = f"{os.getpid()}-{next(_numbers)}"  # a process may start one engine after the other
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._about = {"schema_version": 1, "worker": name, "started": started, **about}
        self._path = folder / f"worker-{name}.json"
        self._writing = threading.Lock()
        self.clear()
        atexit.register(self.write)
        threading.Thread(target=self._keep, daemon=True).start()

    def count(self, tokens: int, scheduled: int, outputs: int, length: float | None) -> None:
        """Count one step.

        Args:
            tokens: rows of all layers but the output head, with padding.
            scheduled: without.
            outputs: rows of the output head.
            length: the mean over sequences if each has one token, with that; else None.
        """
        self._steps += 1
        self._scheduled += scheduled
        self._tokens[tokens] += 1
        self._outputs[outputs] += 1
        if length is not None:
            self._decodes[scheduled, bucket(round(length))] += 1

    def clear(self) -> None:
        """Forget all steps so far."""
        self._steps = self._scheduled = 0
        self._tokens, self._outputs = Counter[int](), Counter[int]()
        self._decodes = Counter[tuple[int, int]]()

    def write(self) -> None:
        """Replace the file. A failure is announced: it does not end the engine."""
        counted = {
            "scheduled": self._scheduled,
            "tokens": self._tokens.copy(),  # the engine's thread may be counting
            "outputs": self._outputs.copy(),
            "decodes": [[*key, count] for key, count in self._decodes.copy().items()],
        }
        partial = self._path.with_suffix(".partial")
        with self._writing:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(self._about | counted))
                partial.replace(self._path)
            except OSError as error:
                log.warning(
                    "CUSTOM_KERNELS_CAPTURE: shapes are lost, %s: %s", self._path, error.strerror
                )

    def _keep(self) -> None:
        done, wait = -1, threading.Event()
        while not wait.wait(SECONDS):
            if self._steps != done:
                done = self._steps
                self.write()


def folder() -> Path | None:
    """Where the environment wants the files, if it does."""
    given = os.environ.get(ENVIRONMENT)
    return Path(given) if given else None
