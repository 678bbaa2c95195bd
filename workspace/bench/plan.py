# SPDX-License-Identifier: Apache-2.0
"""The options of `make bench` with every default filled in."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

import psutil

from workspace.bench import operations, serving
from workspace.bench.checkpoint import METHOD
from workspace.bench.models import Model
from workspace.bench.provenance import cpu_flags, cpu_name
from workspace.bench.record import DeviceKind, Executor, Metric
from workspace.host.errors import WorkspaceError
from workspace.host.text import make_command, plural
from workspace.pins.release import to_repeat
from workspace.verbs import Bench

Engine = Literal["fork", "released"]
Way = Literal["layer", "ir"]
Baseline = Literal["stock", "bf16", "fp8", "int8", "pristine", "self"]


RAY_ADDRESS = "RAY_ADDRESS"
"""Ray's own variable: the cluster to run on."""


class Sizes(NamedTuple):
    """Defaults of a workload."""

    input_len: int
    output_len: int
    num_prompts: int
    rounds: int


@dataclass(frozen=True)
class Device:
    """What vLLM is installed for; `count` is GPUs, or the cores that this process may use.

    `exact_int8` says whether vLLM's products of int8 are exact. On a CPU without VNNI oneDNN adds
    pairs of products in 16 bits, which saturate: a layer is 4 to 6 % off (measured on an AMD EPYC
    with AVX2).
    """

    kind: DeviceKind
    count: int
    name: str
    exact_int8: bool = True


@dataclass(frozen=True)
class Plan:
    """The options with every default filled in.

    `repeats` is the number of pairs of processes, `rounds` the measured rounds of each process.
    """

    model: Model
    device: Device
    metric: Metric
    input_len: int
    output_len: int
    num_prompts: int
    op: str | None
    """The operations of the custom variant; None means the GEMM."""
    backend: str | None
    """That of a single operation; None means the best."""
    layers: str | None
    """Comma-separated patterns of the layers that run the custom kernel; None means all."""
    quantization: str | None
    """The method that the custom variant is given, which then does not run the custom GEMM."""
    repeats: int
    rounds: int
    tensor_parallel: int
    eager: bool
    baseline: Baseline
    pipeline_parallel: int = 1
    executor: Executor = "mp"
    engine: Engine = "fork"
    way: Way = "layer"
    request_rate: float | None = None
    """Requests per second of METRIC=serve; None: all at once."""
    goodput: str | None = None
    interpret: bool = False
    """Whether a backend is a Triton kernel that runs in Triton's interpreter."""

    @property
    def operations(self) -> dict[str, str | None]:
        """The operations of the custom variant with their backends; without those of a method."""
        return operations.chosen(self.op, self.backend)

    @property
    def workers(self) -> int:
        """Worker processes of the engine: those of tensor parallelism, in each pipeline stage."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def counts_layers(self) -> bool:
        """Whether the custom variant is to prove the layers in which its kernels ran.

        Without patterns, the GEMM runs whatever asks vLLM for one; an op of vLLM's IR is not told
        its layer.
        """
        if self.way == "ir":
            return False
        return bool(self.layers or self.method or set(self.operations) != {operations.GEMM})

    @property
    def method(self) -> str | None:
        """The quantization method of the custom variant: given, or the one that vLLM chooses."""
        return self.quantization or (METHOD if self.model.pattern else None)

    @property
    def same_weights(self) -> bool:
        """Whether the baseline has the same 8-bit weights as the custom variant, dense."""
        quantized = self.model.quantized
        return bool(self.method and quantized and self.baseline == quantized.precision)

    @property
    def inexact(self) -> bool:
        """Whether the baseline has the same weights, and products that are not exact."""
        return self.same_weights and self.baseline == "int8" and not self.device.exact_int8

    @property
    def lossy(self) -> bool:
        """Whether the variants compute different things, because one is quantized or inexact."""
        if self.same_weights:
            return self.inexact
        return self.method is not None or self.baseline == "fp8"

    @property
    def slack(self) -> float:
        """Share by which the number of prompt tokens may be off.

        vLLM's random dataset decodes random ids and encodes the text again; with a real vocabulary
        the number of tokens may change: by 2 of 64 with 384 entries. With the synthetic tokenizer
        it does not.
        """
        return 0.05 if self.model.weights == "real" else 0.0

    @property
    def input_tokens_per_round(self) -> int:
        return self.num_prompts * self.input_len

    @property
    def output_tokens_per_round(self) -> int:
        return self.num_prompts * self.output_len


# On the CPU for a small model; workspace.bench.workload has smaller ones. On a GPU, rounds of two
# seconds (512 requests) and of 0.4 s scattered by 20 and 40 % on an H100, so throughput has more
# requests and latency more rounds.
DEFAULTS: dict[tuple[DeviceKind, Metric], Sizes] = {
    ("cpu", "throughput"): Sizes(64, 64, 64, 5),
    ("cpu", "latency"): Sizes(32, 32, 1, 5),
    ("cpu", "serve"): Sizes(32, 64, 64, 5),
    ("cuda", "throughput"): Sizes(512, 128, 2048, 5),
    ("cuda", "latency"): Sizes(512, 128, 8, 30),
    ("cuda", "serve"): Sizes(512, 128, 1024, 5),
}
REPEATS = 2
"""Two processes per variant."""


def detect_device() -> Device:
    """The device of the installed vLLM.

    Raises:
        WorkspaceError: no vLLM, or one for CUDA without a visible GPU.
    """
    try:
        vllm_version = version("vllm")
    except PackageNotFoundError:
        raise WorkspaceError("vLLM is not installed in this environment; run make dev") from None
    if "cpu" in vllm_version:
        exact_int8 = any("vnni" in flag or flag == "amx_int8" for flag in cpu_flags())
        return Device("cpu", len(os.sched_getaffinity(0)), cpu_name(), exact_int8)
    names = _gpu_names()
    if not names:
        raise WorkspaceError(
            f"vLLM {vllm_version} is installed for CUDA but no GPU is visible; "
            "run make dev DEVICE=cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return Device("cuda", len(names), names[0])


def make_plan(options: Bench, device: Device, model: Model, sizes: Sizes | None = None) -> Plan:
    """Fill in the defaults, or these `sizes`, and check what depends on device and model.

    Raises:
        WorkspaceError: more workers than devices, or a number that does not divide the attention
            heads; more stages than layers; more tokens than the model's maximum length; what only
            some engines can; or a BASELINE that the model does not have.
    """
    metric: Metric = options.metric or "throughput"
    sizes = sizes or DEFAULTS[device.kind, metric]
    longest = model.config.max_position_embeddings
    input_len = options.input_len or min(sizes.input_len, max(1, longest // 2))
    output_len = options.output_len or min(sizes.output_len, max(1, longest // 4))
    tp, pp, executor = options.tp or 1, options.pp or 1, options.executor or "mp"
    _check_workers(tp, pp, executor, device)
    elsewhere = {"METRIC=serve": metric == "serve", "ENGINE=released": options.engine == "released",
                 "BASELINE=pristine": options.baseline == "pristine"}  # fmt: skip
    if executor == "ray" and ray_cluster() and any(elsewhere.values()):
        given = " and ".join(name for name, one in elsewhere.items() if one)
        raise WorkspaceError(
            f"{RAY_ADDRESS}={ray_cluster()}: {given} cannot be proven on other hosts; leave it "
            f"out, or unset {RAY_ADDRESS} for a Ray on this machine"
        )
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    if pp > 1 and executor == "ray" and device.kind == "cpu":
        raise WorkspaceError(
            f"PP={pp} EXECUTOR=ray: on a CPU vLLM runs pipeline stages with EXECUTOR=mp alone; "
            "leave out one of the two"
        )
    if pp > layers:
        raise WorkspaceError(f"PP={pp}: {model.name} has {layers} layers; lower PP")
    if heads % tp:
        raise WorkspaceError(
            f"TP={tp}: {model.name} has {heads} attention heads; TP must divide it"
        )
    # vLLM's CPU engine makes what a stage receives into when it compiles, and not otherwise.
    needs_compiling = device.kind == "cpu" and pp > 1
    if needs_compiling and options.eager == "1":
        raise WorkspaceError(
            f"EAGER=1: vLLM's CPU engine runs PP={pp} with compiled models alone; leave out EAGER"
        )
    if input_len + output_len > longest:
        raise WorkspaceError(
            f"INPUT_LEN={input_len} + OUTPUT_LEN={output_len} is more than the "
            f"{longest} tokens that {model.name} supports; lower one of them"
        )
    return Plan(
        model=model,
        device=device,
        metric=metric,
        input_len=input_len,
        output_len=output_len,
        num_prompts=options.num_prompts or sizes.num_prompts,
        op=options.op,
        backend=options.backend,
        layers=options.layers,
        quantization=options.quantization,
        repeats=options.repeats or REPEATS,
        rounds=options.rounds or sizes.rounds,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        executor=executor,
        eager=(
            device.kind == "cpu" and not needs_compiling
            if options.eager is None
            else options.eager == "1"
        ),
        baseline=_baseline(options, model),
        engine=options.engine or "fork",
        way=options.way or "layer",
        request_rate=serving.request_rate(options.request_rate),
        goodput=serving.goodput(options.goodput),
        interpret=(
            options.interpret
            and device.kind == "cpu"
            and operations.interpreted(operations.chosen(options.op, options.backend))
        ),
    )


def _check_workers(tp: int, pp: int, executor: Executor, device: Device) -> None:
    """Raise if so many workers cannot be started. Ray, asked for devices that a cluster does not
    have, waits for more of them for half an hour.

    Raises:
        WorkspaceError: Ray is not installed, or there are more workers than devices.
    """
    if executor == "ray" and find_spec("ray") is None:
        raise WorkspaceError(
            "EXECUTOR=ray: Ray is not installed in this environment; install it with pip, or "
            "leave out EXECUTOR"
        )
    if tp * pp <= device.count or (executor == "ray" and ray_cluster()):
        return
    asked = f"TP={tp}" + (f" PP={pp}" if pp > 1 else "")
    names = "TP or PP" if pp > 1 else "TP"
    devices = plural(device.count, "CPU core" if device.kind == "cpu" else "GPU")
    raise WorkspaceError(f"{asked}: this machine has {devices}; lower {names}")


def ray_cluster() -> str | None:
    """The address of the user's Ray cluster; without one Ray runs on this machine alone."""
    return os.environ.get(RAY_ADDRESS) or None


def _baseline(options: Bench, model: Model) -> Baseline:
    """What the custom variant is compared with.

    Raises:
        WorkspaceError: this model has no such baseline, or ignores another option.
    """
    wanted, quantized = options.baseline, model.quantized
    if quantized is None or not (quantized.pattern or options.quantization):
        if wanted == "int8":
            raise WorkspaceError(
                f"BASELINE=int8: vLLM has no method that quantizes {model.name} to int8 while it "
                "loads; make convert DTYPE=int8 writes a sparse model that has this baseline"
            )
        return "stock" if wanted in (None, "bf16") else wanted
    ignored = {
        "OP": options.op,
        "BACKEND": options.backend,
        "LAYERS": options.layers,
        "QUANTIZATION": quantized.pattern and options.quantization,
        f"BASELINE={wanted}": wanted in ("pristine", "self"),
    }
    if given := [name for name, value in ignored.items() if value]:
        raise WorkspaceError(
            f"MODEL={model.name}: its weights are sparse ({quantized.label}), so vLLM runs the "
            f"sparse kernels in all of its layers; leave out {' and '.join(given)}"
        )
    if wanted in ("stock", "bf16"):
        return "bf16"
    if quantized.precision is None or quantized.dense is None:
        raise WorkspaceError(
            f"MODEL={model.name}: its tensors ({quantized.label}) are not stored as dense 8-bit "
            "ones, which vLLM's own method could load; a model that make convert writes has that "
            "baseline"
        )
    if wanted not in (None, quantized.precision):
        raise WorkspaceError(
            f"BASELINE={wanted}: the weights of {model.name} are {quantized.precision}; use "
            f"BASELINE={quantized.precision} (the same weights, dense) or BASELINE=bf16"
        )
    return quantized.precision


def check_quantization(name: str | None) -> None:
    """Raise unless the kernels package has a quantization method of this name.

    Raises:
        WorkspaceError: unknown, or chosen by a model alone; names the known methods.
    """
    if name is None:
        return
    if name == METHOD:
        raise WorkspaceError(
            f"QUANTIZATION={name}: vLLM chooses it by the model's config.json; leave it out and "
            "pass a sparse MODEL, as make convert writes one"
        )
    from custom_kernels.vllm import quantization

    names = [one for one in quantization.names() if one != METHOD]
    if name not in names:
        known = ", ".join(names)
        raise WorkspaceError(
            f"QUANTIZATION={name}: no such method in kernels/custom_kernels/vllm/quantization; "
            f"known: {known}"
        )


def check_memory(plan: Plan) -> None:
    """Raise if the weights do not fit into free memory on the CPU.

    While it is packed, vLLM holds a weight twice.

    Raises:
        WorkspaceError: not enough memory; how much is needed and how much is free.
    """
    count = plan.model.config.parameters
    if plan.device.kind != "cpu" or count is None:
        return
    needed = 2 * 2 * count / 2**30
    free = psutil.virtual_memory().available / 2**30
    if needed > free:
        raise WorkspaceError(
            f"MODEL={plan.model.name}: needs about {needed:.0f} GiB of memory for its weights and "
            f"{free:.0f} GiB are free; use a smaller MODEL"
        )


def repeat_command(plan: Plan) -> str:
    """The `make` command that runs the same benchmark, every default written out."""
    return make_command(
        "bench",
        MODEL=plan.model.requested_path or plan.model.name,
        METRIC=plan.metric,
        INPUT_LEN=plan.input_len,
        OUTPUT_LEN=plan.output_len,
        NUM_PROMPTS=plan.num_prompts,
        REQUEST_RATE=None if plan.request_rate is None else f"{plan.request_rate:g}",
        GOODPUT=plan.goodput,
        OP=plan.op,
        BACKEND=plan.backend,
        LAYERS=plan.layers,
        QUANTIZATION=plan.quantization,
        REPEATS=plan.repeats,
        ROUNDS=plan.rounds,
        TP=plan.tensor_parallel,
        PP=plan.pipeline_parallel if plan.pipeline_parallel > 1 else None,
        EXECUTOR=plan.executor if plan.executor != "mp" else None,
        EAGER=int(plan.eager),
        BASELINE=plan.baseline if plan.baseline != "stock" else None,
        ENGINE=plan.engine if plan.engine != "fork" else None,
        WAY=plan.way if plan.way != "layer" else None,
        VLLM_VERSION=to_repeat(),
        TRITON_INTERPRET=1 if plan.interpret else None,
    )


def _gpu_names() -> list[str]:
    """Names of the GPUs in CUDA_VISIBLE_DEVICES, from NVML, which does not initialize CUDA."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except Exception:  # no package, no driver, no permission: all mean no usable GPU
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    chosen = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    # A GPU may also be chosen by its UUID; on one machine they are nearly always of one kind.
    return [names[int(c) if c.isdigit() and int(c) < len(names) else 0] for c in chosen if names]
