# SPDX-License-Identifier: Apache-2.0
"""The variants of a comparison: environment and arguments of their processes."""

import json
import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from workspace.bench import operations
from workspace.bench.messages import EXECUTOR, WORKER_EXTENSION
from workspace.bench.models import DUMMY_FORMAT, Model
from workspace.bench.noise import AGAIN
from workspace.bench.plan import RAY_ADDRESS, Plan, ray_cluster
from workspace.bench.releases import random_lengths
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.pins.release import tree

INTERPRET = "TRITON_INTERPRET"
"""Triton's own variable: kernels run in its interpreter, one operation after the other."""
LAUNCH_LOG = "CUSTOM_KERNELS_LAUNCH_LOG"
PLUGINS, PLUGIN = "VLLM_PLUGINS", "custom_kernels"
"""The variable that names the plugins vLLM loads, and this one's name (kernels/pyproject.toml)."""

HOST = "127.0.0.1"
"""Where METRIC=serve listens."""
LOCAL = {
    "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
    "VLLM_HOST_IP": HOST,
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of every process of vLLM: it asks nobody, and listens to this machine only."""
RAY_ALONE = {
    RAY_ADDRESS: "local",  # else Ray also joins a cluster that somebody started on this machine
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray listen to this machine only
}
"""Environment of a Ray that begins and ends with its engine."""
KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Of the user's own servers; with one, our clients would be turned away or hand it on."""

GIB = 2**30
LENGTH_STEP = 128
"""vLLM's KV blocks hold up to 128 tokens; the length limit is rounded up to whole blocks."""
VLLM_SEQUENCES, VLLM_BATCHED = 256, 4096
"""vLLM's defaults for `vllm bench` on the CPU."""
COMPARED_PROMPTS = 8
"""Prompts of the output comparison, one batch."""


@dataclass(frozen=True)
class Variant:
    """One variant: its name, switches and arguments, and whether it must launch custom kernels.

    `python_path` comes first on the module path, for example another vLLM tree; `model` is loaded
    instead of the plan's.
    """

    name: str
    switches: dict[str, str] = field(default_factory=dict)
    launches: bool = False
    arguments: tuple[str, ...] = ()
    python_path: Path | None = None
    model: Model | None = None


def stock_and_custom(plan: Plan) -> tuple[Variant, Variant]:
    """vLLM with the switch unset, perhaps with a quantization method of its own; and with it set,
    or with a custom quantization method."""
    return baseline(plan), custom(plan)


def stock_and_itself(plan: Plan) -> tuple[Variant, Variant]:
    """BASELINE=self: the same twice. Neither launches custom kernels."""
    return Variant("stock"), Variant(AGAIN)


def baseline(plan: Plan) -> Variant:
    """What the custom variant is compared with."""
    if plan.same_weights and plan.model.quantized:
        dense = json.dumps({"quantization_config": plan.model.quantized.dense})
        return Variant(plan.baseline, arguments=("--hf-overrides", dense))
    if plan.baseline == "fp8":
        return Variant("fp8", arguments=("--quantization", "fp8"))
    return Variant(plan.baseline, model=plan.model.converted_from)


def custom(plan: Plan) -> Variant:
    """The variant that launches custom kernels."""
    if plan.method:
        given = ("--quantization", plan.quantization) if plan.quantization else ()
        return Variant("custom", launches=True, arguments=given)
    if plan.way == "ir":
        return Variant("custom", launches=True, arguments=operations.ir_arguments(plan.operations))
    switches = operations.switches(plan.operations, plan.layers)
    switches |= {INTERPRET: "1"} if plan.interpret else {}
    arguments = operations.arguments(plan.operations, plan.device.kind)
    return Variant("custom", switches, launches=True, arguments=arguments)


def common_settings(plan: Plan) -> dict[str, str]:
    """Environment of both variants, in addition to the user's own."""
    settings = dict(LOCAL)
    if plan.metric == "serve":
        settings["no_proxy"] = HOST  # vLLM's client would go through the user's proxy
    if plan.device.kind == "cpu":
        tokens = min(plan.num_prompts, 64) * (plan.input_len + plan.output_len)
        size = tokens * plan.model.kv_bytes_per_token / plan.workers
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(4, math.ceil(size / GIB))))
        if plan.executor == "mp" and plan.workers > 1:
            settings["VLLM_CPU_OMP_THREADS_BIND"] = bind_threads(plan.workers)
        elif plan.executor == "mp" and plan.metric != "serve":
            # One process instead of three: half the start-up time on a small machine.
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if plan.executor == "ray":
        settings |= {RAY_ADDRESS: cluster} if (cluster := ray_cluster()) else RAY_ALONE
    return settings


def environment(plan: Plan, variant: Variant, launch_log: Path) -> dict[str, str]:
    """The whole environment of a variant's process.

    Switches and `common_settings` that the user has set are replaced: the variants differ in
    nothing but their switches.
    """
    # Triton's interpreter is for a custom kernel on the CPU, and then a switch of its variant:
    # elsewhere vLLM's own Triton kernels would run a thousand times slower in it, or fail.
    removed = (*operations.SWITCHES, INTERPRET, *KEYS)
    inherited = {k: v for k, v in os.environ.items() if k not in removed}
    result = inherited | common_settings(plan) | variant.switches
    result[LAUNCH_LOG] = str(launch_log)
    if variant.python_path is not None:
        paths = [str(variant.python_path), os.environ.get("PYTHONPATH")]
        result["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return result


def check_surroundings() -> None:
    """Raise if the user's environment keeps any engine from working.

    Raises:
        WorkspaceError: the variable, and what to set it to.
    """
    plugins = os.environ.get(PLUGINS)
    if plugins is not None and PLUGIN not in plugins.split(","):
        raise WorkspaceError(
            f"{PLUGINS}={plugins} leaves out {PLUGIN}, which registers the custom kernels in vLLM; "
            f"unset {PLUGINS}, or add {PLUGIN} to it"
        )
    # As vLLM chooses it; everything else that an engine writes is below HOME by default, too.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(cache, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise WorkspaceError(
            f"vLLM's cache folder {cache} cannot be written ({reason}); set HOME, or "
            "VLLM_CACHE_ROOT alone, to a folder that can be"
        )


def arguments(plan: Plan, variant: Variant) -> list[str]:
    """Arguments of a variant for `vllm bench METRIC`, without seed and output file; of
    METRIC=serve without those of the server."""
    if plan.metric == "serve":
        return [*_clients(plan), *_model(plan, variant)]
    if plan.metric == "throughput":
        workload = ["--dataset-name", "random"]
        workload += random_lengths(tree(), plan.input_len, plan.output_len)
        workload += ["--num-prompts", str(plan.num_prompts)]
    else:
        workload = ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
        workload += ["--batch-size", str(plan.num_prompts)]
        workload += ["--num-iters-warmup", "0", "--num-iters", "1"]
    return [*workload, *engine_arguments(plan, variant)]


def _clients(plan: Plan) -> list[str]:
    """Arguments of `vllm bench serve`: random prompts that are continued greedily."""
    result = ["--dataset-name", "random", "--num-prompts", str(plan.num_prompts)]
    result += ["--random-input-len", str(plan.input_len)]
    result += ["--random-output-len", str(plan.output_len), "--ignore-eos", "--temperature", "0"]
    rate = "inf" if plan.request_rate is None else f"{plan.request_rate:g}"
    result += ["--request-rate", rate, "--percentile-metrics", "ttft,tpot"]
    result += ["--metric-percentiles", "99"]
    return [*result, *(["--goodput", *plan.goodput.split()] if plan.goodput else [])]


def server_arguments(plan: Plan, variant: Variant) -> list[str]:
    """Arguments of a variant for `vllm serve`, without host and port; empty if nothing is served.

    What a model's generation_config.json would add to a request, a penalty for one, would have an
    effect on the comparison of outputs.
    """
    if plan.metric != "serve":
        return []
    return [*engine_arguments(plan, variant), "--generation-config", "vllm"]


def _model(plan: Plan, variant: Variant) -> list[str]:
    model = variant.model or plan.model
    return ["--model", str(model.folder), "--tokenizer", str(model.tokenizer)]


def engine_arguments(plan: Plan, variant: Variant) -> list[str]:
    """Those of them that are about the engine."""
    result = _model(plan, variant)
    result += ["--max-model-len", str(max_model_len(plan))]
    result += ["--tensor-parallel-size", str(plan.tensor_parallel)]
    if plan.pipeline_parallel > 1:
        result += ["--pipeline-parallel-size", str(plan.pipeline_parallel)]
    if plan.executor == "ray":
        backend = "workspace.bench.ray_cpu.Executor" if plan.device.kind == "cpu" else "ray"
        result += [EXECUTOR, backend]
    if plan.device.kind == "cpu":
        sequences, batched = batch_limits(plan)
        result += ["--max-num-seqs", str(sequences), "--max-num-batched-tokens", str(batched)]
    result += ["--no-enable-prefix-caching"]  # a repeated prompt must not be cheaper
    if plan.eager:
        result += ["--enforce-eager"]
    if plan.model.weights == "dummy":
        result += ["--load-format", DUMMY_FORMAT]
        result += [WORKER_EXTENSION, "workspace.bench.dummy_weights.WorkerExtension"]
        if plan.model.pattern:  # which the configuration of its dense peer does not name
            result += ["--model-loader-extra-config", json.dumps({"pattern": plan.model.pattern})]
    elif plan.executor == "ray" or operations.ATTENTION in plan.operations:
        result += [WORKER_EXTENSION, "workspace.bench.worker.WorkerExtension"]
    return [*result, *variant.arguments]


def command_line(plan: Plan, variant: Variant) -> str:
    """The variant as a shell command to run in the root of the checkout."""
    settings = {**common_settings(plan), **variant.switches}
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    commands = [["vllm", "bench", plan.metric, *arguments(plan, variant)]]
    if plan.metric == "serve":
        commands[0] += ["--ready-check-timeout-sec", "600"]
        _, model, *others = server_arguments(plan, variant)
        commands.insert(0, ["vllm", "serve", model, *others, "--host", HOST])
    # A record may be published: without the checkout's absolute path.
    given = [[argument.removeprefix(f"{ROOT}/") for argument in one] for one in commands]
    return " & ".join(" ".join([*words, *map(shlex.quote, one)]) for one in given)


def batch_limits(plan: Plan) -> tuple[int, int]:
    """Maximum requests and tokens of one engine step on the CPU.

    vLLM's own limits, but no more than the run can use: the engine warms up with a batch of that
    many tokens, which takes minutes for 4096 tokens of a real model on a small machine.
    """
    sequences = min(VLLM_SEQUENCES, max(plan.num_prompts, COMPARED_PROMPTS))
    whole = max(plan.num_prompts * plan.input_len, max_model_len(plan), sequences)
    return sequences, min(VLLM_BATCHED, whole)


def max_model_len(plan: Plan) -> int:
    """Room for a request and for the prompts of the output comparison, in whole KV blocks."""
    blocks = math.ceil((plan.input_len * (1 + plan.slack) + plan.output_len) / LENGTH_STEP)
    return min(plan.model.config.max_position_embeddings, blocks * LENGTH_STEP)


def bind_threads(workers: int) -> str:
    """Cores for each worker in vLLM's notation: "0-1|2-3" for two workers on four cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // workers
    groups = [cores[i * share : (i + 1) * share] for i in range(workers)]
    return "|".join(",".join(map(str, group)) for group in groups)
