# SPDX-License-Identifier: Apache-2.0
"""EXECUTOR=ray on a CPU: vLLM's own Ray executor, with a CPU core as the resource of a worker.

vLLM's CPU platform names no resource by which Ray could place workers (`ray_device_key` is empty),
and its executor then refuses to start. vLLM gets this class as `--distributed-executor-backend`. It
is imported in engine processes, and by Ray in the workers.
"""

from contextlib import suppress
from typing import Any

import psutil
import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

from workspace.bench.plan import ray_cluster

STARTS = 5
"""Ray gives parts of itself 15 seconds to start, which are too few on a busy machine."""


class Worker(ray_executor_v2.RayWorkerProc):
    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []


class Executor(ray_executor_v2.RayExecutorV2):
    def _init_executor(self) -> None:
        type(current_platform).ray_device_key = "CPU"
        ray_executor_v2.RayWorkerProc = Worker
        if ray_cluster() == "local":
            start_ray()
        super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {}  # the cores are those of the placement group


def start_ray() -> None:
    """Start a Ray on this machine."""
    others = psutil.Process().children(recursive=True)
    for left in reversed(range(STARTS)):
        try:
            ray.init(include_dashboard=False)
            return
        except Exception:
            ray.shutdown()
            for process in psutil.Process().children(recursive=True):
                if process not in others:  # of a Ray that started in part
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            if not left:
                raise
