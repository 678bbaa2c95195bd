# SPDX-License-Identifier: Apache-2.0
"""Every verb with its options: the table from which bootstrap and the command line read them, and
with which a test compares the Makefile and docs/reference.md."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from workspace.host.errors import WorkspaceError
from workspace.host.options import choice, declared, flag, number, read, text

ARCH = "GPU architectures, with commas"
KERNEL = "`OPERATION` or `OPERATION.BACKEND`"


@dataclass(frozen=True)
class NoOptions:
    pass


# --- set up ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compile:
    """Options of a build of vLLM's C++ and CUDA."""

    cuda_archs: str | None = text(
        "CUDA_ARCHS", "GPU architectures for vLLM, with commas", "this machine's GPUs", "9.0a"
    )
    jobs: int | None = number("JOBS", "parallel compile jobs", "by cores and free memory", "4")


@dataclass(frozen=True)
class Dev(Compile):
    build: str | None = choice(
        "BUILD",
        "`full` compiles all of vLLM here, as `make fork-build` does; `precompiled` restores the "
        "released wheel's binaries",
        "full", "precompiled",
        default="the existing binaries, initially the wheel's",
    )  # fmt: skip
    force: bool = flag("FORCE", "replace binaries in the tree that were edited by hand")


@dataclass(frozen=True)
class Report:
    """Options of a verb that prints a state."""

    json: bool = flag("JSON", "print JSON")


@dataclass(frozen=True)
class Clean:
    force: bool = flag("FORCE", "remove your commits and edits, too")


@dataclass(frozen=True)
class Lock:
    upgrade: bool = flag("UPGRADE", "use the newest versions that the pins allow")


# --- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    arch: str | None = text("ARCH", ARCH, "all pinned ones", "9.0a")


@dataclass(frozen=True)
class NewKernel:
    op: str | None = text("OP", "an operation, existing or new", example="gemm")
    backend: str | None = choice("BACKEND", "its language", "triton", "cuda", "cupy")
    name: str | None = text("NAME", "its file name", "`BACKEND`", "mine")


def _check_top(top: int | None, shapes: str | None) -> None:
    if top and not shapes:
        raise WorkspaceError("TOP= counts shapes of a capture; name its record with SHAPES=")


@dataclass(frozen=True)
class Watch:
    k: str | None = text("K", f"{KERNEL}, several with commas", example="gemm.triton")
    arch: str | None = text(
        "ARCH", "compile for this GPU architecture", "the GPU's, else 9.0a", "9.0a"
    )
    shapes: str | None = text(
        "SHAPES",
        "a record of `make capture`: on a GPU its shapes are timed, not the usual two",
        example="capture.json",
    )
    top: int | None = number("TOP", "with `SHAPES`: so many shapes, those that cost most", "10")
    timeout: int | None = number("TIMEOUT", "seconds after which a hanging kernel is killed", "30")

    def __post_init__(self) -> None:
        _check_top(self.top, self.shapes)


@dataclass(frozen=True)
class Inspect:
    k: str | None = text("K", f"{KERNEL}, several with commas", "every kernel", "gemm.triton")
    arch: str | None = text("ARCH", ARCH, "all pinned ones", "9.0a")
    json: bool = flag("JSON", "print JSON")


@dataclass(frozen=True)
class BenchKernels:
    k: str | None = text("K", KERNEL, "`gemm`", "gemm")
    model: str | None = text(
        "MODEL", "models whose layer shapes are measured, with commas", "by operation"
    )
    m: str | None = text("M", "numbers of tokens, with commas", "by operation", "1,16,4096")
    backend: str | None = text("BACKEND", "backends, with commas", "all available ones")
    dtype: str | None = text("DTYPE", "a torch dtype", "the operation's first")
    pattern: str | None = text(
        "PATTERN", "sparsity patterns, with commas", "by operation", "2:4,6:8"
    )
    seconds: str | None = text("SECONDS", "device time per shape", "0.25")
    shapes: str | None = text(
        "SHAPES",
        "a record of `make capture`: its shapes are measured, and weighted by their calls",
        example="capture.json",
    )
    top: int | None = number("TOP", "with `SHAPES`: so many shapes, those that cost most", "24")
    tune: bool = flag("TUNE", "use these results to choose backends from now on")

    def __post_init__(self) -> None:
        _check_top(self.top, self.shapes)


@dataclass(frozen=True)
class Capture:
    model: str | None = text("MODEL", "as for `bench`", "as for `bench`")
    input_len: int | None = number("INPUT_LEN", "prompt tokens per request", "as for `bench`")
    output_len: int | None = number("OUTPUT_LEN", "new tokens per request", "as for `bench`")
    num_prompts: int | None = number("NUM_PROMPTS", "requests of the round", "as for `bench`")
    tp: int | None = number("TP", "tensor-parallel processes", "1")
    eager: Literal["0", "1"] | None = choice(
        "EAGER", "`1`: no torch.compile, no CUDA graphs", "0", "1", default="CPU 1, GPU 0"
    )
    source: str | None = text(
        "FROM",
        "a folder that the workers of an engine wrote, started with `CUSTOM_KERNELS_CAPTURE=folder`"
        "; nothing is run",
        example="folder",
    )

    def __post_init__(self) -> None:
        run = {"MODEL": self.model, "INPUT_LEN": self.input_len, "OUTPUT_LEN": self.output_len,
               "NUM_PROMPTS": self.num_prompts, "TP": self.tp, "EAGER": self.eager}  # fmt: skip
        if self.source and (given := [name for name, value in run.items() if value]):
            raise WorkspaceError(
                f"FROM={self.source} reads what ran already; leave out {' and '.join(given)}"
            )


@dataclass(frozen=True)
class Profile:
    k: str | None = text("K", KERNEL, "`gemm`", "gemm")
    backend: str | None = text("BACKEND", "a backend", "the best for the device")
    model: str | None = text("MODEL", "the model with the layer", "the largest measured one")
    layer: str | None = text("LAYER", "the layer whose shape is used", "the first")
    m: str | None = text("M", "number of tokens", "4096")
    dtype: str | None = text("DTYPE", "a torch dtype", "the operation's first")
    pattern: str | None = text("PATTERN", "a sparsity pattern", "the first", "6:8")


@dataclass(frozen=True)
class Sanitize:
    k: str | None = text("K", f"{KERNEL}, several with commas", example="gemm.triton")
    tool: str | None = text(
        "TOOL",
        "of `memcheck`, `racecheck`, `initcheck` and `synccheck`, with commas",
        "all four",
        "memcheck,racecheck",
    )
    dtype: str | None = text("DTYPE", "a torch dtype", "the backend's first")
    full: bool = flag("FULL", "all dtypes, two sets of numbers, as `make test`")
    timeout: int | None = number(
        "TIMEOUT", "seconds after which a kernel under a tool is killed", "600"
    )


@dataclass(frozen=True)
class TwoRecords:
    a: str | None = text("A", "the record before", example="before.json")
    b: str | None = text("B", "the record after", example="after.json")


@dataclass(frozen=True)
class Test:
    k: str | None = text("K", f"{KERNEL}, paths, or an argument of `pytest -k`", "all", "gemm")


# --- vLLM -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    model: str | None = text(
        "MODEL",
        "a folder with complete weights or without any (dummy weights); a hub id, from the local "
        "cache or the hub; offline, an id of the catalogue (Qwen2.5 0.5B to 14B, Llama-3.2 1B and "
        "3B) with dummy weights",
        "GPU: Qwen/Qwen2.5-0.5B; CPU: a bundled tiny Qwen2",
    )
    metric: Literal["throughput", "latency", "serve"] | None = choice(
        "METRIC",
        "what is measured; `serve`: `vllm serve` on the loopback as its clients see it",
        "throughput", "latency", "serve",
        default="`throughput`",
    )  # fmt: skip
    op: str | None = text(
        "OP",
        "operations that the custom variant runs in vLLM, with commas, each perhaps with its "
        "backend: `gemm`, `rms_norm`, `silu_and_mul`, `rotary_embedding`, `paged_attention` or "
        "one of yours",
        "`gemm`",
        "rms_norm,silu_and_mul.triton",
    )
    backend: str | None = text(
        "BACKEND",
        "its backend, if `OP` is one operation; for the GEMM `cublaslt`, `skinny`, `triton`, "
        "`cupy`, `reference` or one of yours",
        "the best for the device, and for each shape that was measured",
    )
    tp: int | None = number("TP", "tensor-parallel processes", "1")
    pp: int | None = number("PP", "pipeline stages, of `TP` processes each", "1")
    executor: Literal["mp", "ray"] | None = choice(
        "EXECUTOR",
        "what starts vLLM's workers: `mp`, this machine; `ray`, Ray, on "
        "[more than one machine](measuring.md#more-than-one-machine), too",
        "mp", "ray",
        default="`mp`",
    )  # fmt: skip
    repeats: int | None = number("REPEATS", "pairs of engine starts", "2", most=100)
    rounds: int | None = number(
        "ROUNDS",
        "measured rounds per engine start",
        "5; GPU latency: 30; CPU: 3 if time is short",
        most=1000,
    )
    input_len: int | None = number(
        "INPUT_LEN",
        "prompt tokens per request",
        "GPU: by metric; CPU: by model and machine, so that 0.5B on two idle cores takes at most "
        "8 minutes; the first lines of the output show the choice and the expected time",
    )
    output_len: int | None = number("OUTPUT_LEN", "new tokens per request", "as `INPUT_LEN`")
    num_prompts: int | None = number("NUM_PROMPTS", "requests per round", "as `INPUT_LEN`")
    request_rate: str | None = text(
        "REQUEST_RATE",
        "`METRIC=serve`: requests per second, arriving at random; `inf`: all at once",
        "`inf`",
        "4",
    )
    goodput: str | None = text(
        "GOODPUT",
        "`METRIC=serve`: count the requests that keep to these milliseconds: `ttft` to the first "
        "token, `tpot` for each token after that, `e2el` in all",
        example='"ttft:200 tpot:20"',
    )
    layers: str | None = text(
        "LAYERS",
        "shell patterns of the layers that run the custom kernel, with commas: "
        '`"*.mlp.*,lm_head"`; the table shows the calls of each layer',
        "all layers",
    )
    quantization: str | None = text(
        "QUANTIZATION",
        "a method of this workspace (`sparse_2_4`, `sparse_mixed`, `sparse_6_8`, or "
        "[your own](../kernels/README.md#a-quantization-method-of-your-own)) as the custom "
        "variant, compared with the unquantized model or what `BASELINE` says",
    )
    eager: Literal["0", "1"] | None = choice(
        "EAGER", "`1`: no torch.compile, no CUDA graphs", "0", "1", default="CPU 1, GPU 0"
    )
    interpret: bool = flag(
        "TRITON_INTERPRET",
        "on a CPU, run a Triton `BACKEND` in Triton's interpreter: its outputs are proven, its "
        "speed counts for nothing",
    )
    baseline: Literal["stock", "bf16", "fp8", "int8", "pristine", "self"] | None = choice(
        "BASELINE",
        "`stock`, `bf16`: compare with the unquantized model, of a sparse `MODEL` the one that it "
        "was converted from; `fp8`, `int8`: with the weights of a sparse `MODEL` of that precision "
        "as dense ones, in vLLM's own method; `fp8` of an unquantized `MODEL`: with vLLM's own, "
        "which quantizes it while it loads; `pristine`: compare the fork with the switch off with "
        "the unpatched release; `self`: stock with itself, which shows the noise of this machine",
        "stock", "bf16", "fp8", "int8", "pristine", "self",
        default="the precision of a sparse `MODEL`, else `stock`",
    )  # fmt: skip
    engine: Literal["fork", "released"] | None = choice(
        "ENGINE",
        "`released`: both variants in the release without the fork's patches, where our plugin "
        "puts the hook in",
        "fork", "released",
        default="`fork`",
    )  # fmt: skip

    way: Literal["layer", "ir"] | None = choice(
        "WAY",
        "how operations other than the GEMM enter: `layer` replaces vLLM's layer classes, `ir` "
        "implements ops of its IR (`rms_norm`)",
        "layer", "ir",
        default="`layer`",
    )  # fmt: skip

    def __post_init__(self) -> None:
        of_serving = {"REQUEST_RATE": self.request_rate, "GOODPUT": self.goodput}
        if self.metric != "serve" and (given := [name for name, one in of_serving.items() if one]):
            raise WorkspaceError(
                f"{' and '.join(given)} is about a server's clients; use METRIC=serve with it"
            )
        if self.way == "ir" and self.layers:
            raise WorkspaceError(
                "WAY=ir: an op of vLLM's IR is not told its layer; leave out LAYERS"
            )
        if self.engine == "released" and self.baseline == "pristine":
            raise WorkspaceError(
                "BASELINE=pristine compares the fork with the release, ENGINE=released runs no "
                "fork; leave out one of them"
            )
        others = {
            "OP": self.op,
            "WAY": self.way,
            "BACKEND": self.backend,
            "LAYERS": self.layers,
        }
        given = [name for name, value in others.items() if value]
        if self.baseline == "self" and given:
            raise WorkspaceError(
                f"BASELINE=self compares stock with itself; leave out {' and '.join(given)}"
            )
        given += ["BASELINE"] if self.baseline in ("pristine", "self") else []
        if self.quantization and given:
            raise WorkspaceError(
                f"QUANTIZATION={self.quantization} selects its own kernels and is a variant of "
                f"its own; leave out {' and '.join(given)}"
            )


@dataclass(frozen=True)
class Trace:
    model: str | None = text("MODEL", "as for `bench`", "as for `bench`", "Qwen/Qwen2.5-7B")
    op: str | None = text(
        "OP",
        "as for `bench`; with `OP`, `BACKEND`, `LAYERS` or `QUANTIZATION` stock and custom are "
        "traced, and shown side by side",
        "stock alone",
        "rms_norm",
    )
    backend: str | None = text("BACKEND", "as for `bench`", "stock alone")
    layers: str | None = text("LAYERS", "as for `bench`", "all layers")
    quantization: str | None = text(
        "QUANTIZATION", "as for `bench`", "stock alone", example="sparse_2_4"
    )
    baseline: Literal["stock", "bf16", "fp8", "int8"] | None = choice(
        "BASELINE", "as for `bench`", "stock", "bf16", "fp8", "int8", default="as for `bench`"
    )
    engine: Literal["fork", "released"] | None = choice(
        "ENGINE", "as for `bench`", "fork", "released", default="`fork`"
    )
    tp: int | None = number("TP", "tensor-parallel processes; the table is of the first", "1")
    input_len: int | None = number("INPUT_LEN", "prompt tokens per request", "GPU 512, CPU 32")
    output_len: int | None = number(
        "OUTPUT_LEN", "new tokens per request: a step each", "GPU 16, CPU 8"
    )
    num_prompts: int | None = number("NUM_PROMPTS", "requests, all at once", "GPU 8, CPU 4")
    eager: Literal["0", "1"] | None = choice(
        "EAGER", "`1`: no torch.compile, no CUDA graphs", "0", "1", default="CPU 1, GPU 0"
    )


@dataclass(frozen=True)
class Predict:
    trace: str | None = text("TRACE", "a record of `make trace`", example="trace.json")
    kernels: str | None = text(
        "KERNELS", "a record of `make bench-kernels`", example="kernels.json"
    )
    backend: str | None = text("BACKEND", "show every part with this one", "all of the record")
    bench: str | None = text(
        "BENCH", "a record of `make bench METRIC=latency`, to compare with", "none", "bench.json"
    )


@dataclass(frozen=True)
class Ops(Report):
    model: str | None = text("MODEL", "as for `bench`; its weights are not read", "as for `bench`")


@dataclass(frozen=True)
class Convert:
    model: str | None = text(
        "MODEL", "a folder or a hub id, as for `bench`", "as for `bench`", "Qwen/Qwen2.5-0.5B"
    )
    out: str | None = text("OUT", "the folder to write", example="models/q05-24")
    pattern: str | None = text("PATTERN", "a sparsity pattern, or `mixed`", "`2:4`", "2:4")
    dtype: Literal["fp8", "int8"] | None = choice(
        "DTYPE", "what the weights are quantized to", "fp8", "int8", default="`fp8`"
    )
    scores: str | None = text(
        "SCORES",
        "prune by |W| · norm instead of |W|: a safetensors file, layer → norms of its K input "
        "features",
        example="norms.safetensors",
    )
    calibrate: str | None = text(
        "CALIBRATE",
        "a text; the model is run on its first 65,536 tokens to gather those norms",
        example="text.txt",
    )
    dummy: bool = flag("DUMMY", "write no weights; the engine draws, prunes and quantizes them")
    force: bool = flag("FORCE", "replace the model that is in `OUT` when the new one is complete")

    def __post_init__(self) -> None:
        if bool(self.scores) + bool(self.calibrate) + self.dummy > 1:
            raise WorkspaceError("SCORES, CALIBRATE and DUMMY exclude each other; use one of them")


@dataclass(frozen=True)
class Eval:
    model: str | None = text(
        "MODEL", "a folder or hub id with trained weights", "as of `bench`", "models/q05-24"
    )
    text_file: str | None = text("TEXT", "a file in UTF-8", "Python's own manual", "wiki.txt")
    quantization: str | None = text(
        "QUANTIZATION",
        "a method of this workspace, for an unquantized `MODEL`",
        example="sparse_2_4",
    )
    against: str | None = text(
        "AGAINST",
        "another model with the same tokenizer; `fp8`, `int8`: the weights of a sparse `MODEL` of "
        "that precision as dense ones; `fp8` of an unquantized `MODEL`: vLLM's own",
        "the model that a sparse one was converted from; with `QUANTIZATION` the unquantized one",
    )
    tokens: int | None = number(
        "TOKENS",
        "of the text, from its begin",
        "GPU: 262144; CPU: as many as take 4 minutes, at most 16384",
    )
    tp: int | None = number("TP", "tensor-parallel processes", "1")


@dataclass(frozen=True)
class ForkBuild(Compile):
    target: str | None = text("TARGET", "one extension", "all", "_C")
    force: bool = flag("FORCE", "replace binaries in the tree that were edited by hand")


@dataclass(frozen=True)
class ForkDiff:
    own: bool = flag("OWN", "compare with our patches applied")
    stat: bool = flag("STAT", "only files and numbers of lines")


@dataclass(frozen=True)
class ForkExport:
    force: bool = flag("FORCE", "discard patches that are not among the tree's commits")


@dataclass(frozen=True)
class ForkRebase:
    version: str | None = text("VERSION", "the new vLLM release", example="0.33.0")
    abort: bool = flag("ABORT", "return to the previous release")
    force: bool = flag("FORCE", "with `ABORT=1`: discard branches that were created meanwhile")


@dataclass(frozen=True)
class Upgrade:
    version: str | None = text(
        "VERSION", "a vLLM release of the package index", "`latest`, the newest there", "0.33.0"
    )
    default: bool = flag("DEFAULT", "make it the default release if every step passed")


# --- out of the workspace -------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    ops: str | None = text(
        "OPS", "operations, with commas; what they need comes along", "all", "gemm,rms_norm"
    )
    name: str | None = text("NAME", "the package's name", "`custom-kernels`", "my-kernels")
    arch: str | None = text("ARCH", ARCH, "all pinned ones", "9.0a")


@dataclass(frozen=True)
class WheelVerify:
    wheel: str | None = text("WHEEL", "a wheel of `make wheel`", "the newest in dist/")
    ops: str | None = text(
        "OPS",
        "operations that run, with commas, each perhaps with its backend",
        "all of the wheel that run layers of vLLM",
        "gemm,rms_norm.triton",
    )
    model: str | None = text("MODEL", "as for `bench`", "as for `bench`")
    tp: int | None = number("TP", "tensor-parallel processes", "1")


# --- containers and other hosts -------------------------------------------------------------------


@dataclass(frozen=True)
class BuildImage:
    base_image: str | None = text(
        "BASE_IMAGE",
        "the base image: any Debian or Ubuntu with Python 3.11 to 3.13 in its packages; `vllm`: "
        "vLLM's image of the release",
        "`nvidia/cuda` 13.0.2, by digest",
    )
    network: str | None = text(
        "NETWORK",
        "as for `docker build` and `docker run`; `host`: JupyterLab in the container is on this "
        "machine's loopback",
        "Docker's default",
    )


@dataclass(frozen=True)
class Image(BuildImage):
    force: bool = flag("FORCE", "build every step again")


@dataclass(frozen=True)
class Container(BuildImage):
    image: str | None = text("IMAGE", "an image, e.g. a snapshot", "the image of `make image`")
    force: bool = flag("FORCE", "replace a container of another image")


@dataclass(frozen=True)
class Shell:
    cmd: str | None = text("CMD", "one command", "a shell", '"make bench"')


@dataclass(frozen=True)
class Snapshot:
    tag: str | None = text("TAG", "a name, or a full `registry/name:tag`", "date and time", "tuned")
    force: bool = flag("FORCE", "replace the image of that name")


@dataclass(frozen=True)
class SnapshotVerify:
    tag: str | None = text("TAG", "the snapshot's name", example="tuned")


@dataclass(frozen=True)
class Bundle:
    target: str | None = text("TARGET", "the host's inventory", example="inventory.json")
    parts: str | None = text("PARTS", "maximum size of a part, with `K`, `M` or `G`", "2G", "60M")


@dataclass(frozen=True)
class Unbundle:
    source: str | None = text("FROM", "the folder with the bundle's parts", example="folder")


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """A verb.

    Args:
        name: as in `make NAME`.
        help: what it does.
        options: the dataclass of its options.
        host: the module in workspace/ whose `run` does it, for a verb that needs no environment;
            empty for a verb that runs in the environment.
        lock: whether it takes the set-up lock, because it may change what set-up makes.
        internal: not for users, so not in the Makefile.
    """

    name: str
    help: str
    options: type = NoOptions
    host: str = ""
    lock: bool = True
    internal: bool = False

    def read(self) -> Any:
        """Its options from the environment.

        Raises:
            WorkspaceError: a value is not valid.
        """
        return read(self.options, os.environ)

    @property
    def usage(self) -> str:
        """The first of its options, for a line of help."""
        usages = [option.usage for _, option in declared(self.options)]
        return ", ".join([*usages[:4], *(["..."] if len(usages) > 4 else [])])


VERBS = {
    verb.name: verb
    for verb in (
        Verb("dev", "set everything up: environment, vLLM fork, binaries, kernels", Dev),
        Verb("doctor", "what is ready, what is not, and the remedy", Report, lock=False),
        Verb("fork-build", "compile what changed in vLLM's C++ and CUDA", ForkBuild),
        Verb("kernels", "compile the kernels that changed", Kernels),
        Verb("bench", "benchmark vLLM, stock against custom kernels", Bench),
        Verb("trace", "where a step of vLLM's engine spends its time, kernel by kernel", Trace),
        Verb("predict", "what a measured kernel will bring in vLLM's engine", Predict),
        Verb("ops", "layers of a model that can run your kernel, and by which way", Ops),
        Verb("convert", "prune a checkpoint to a sparsity pattern and quantize it", Convert),
        Verb("eval", "perplexity of a text in vLLM, sparse against dense", Eval),
        Verb("new-kernel", "scaffold a working kernel", NewKernel),
        Verb("watch", "on saving a kernel: compile, check, time, show what changed", Watch),
        Verb("inspect", "registers, spills, occupancy, instructions; needs no GPU", Inspect),
        Verb("notebook", "JupyterLab for notebooks/, on this machine only"),
        Verb("capture", "the operations and shapes that vLLM runs, and how often", Capture),
        Verb("bench-kernels", "benchmark kernels on the GPU against their baselines", BenchKernels),
        Verb("compare", "compare two records: faster, slower, same or ambiguous", TwoRecords),
        Verb("report", "one page of HTML of the records, or of two side by side", TwoRecords),
        Verb("profile", "what bounds a kernel and where it waits, by Nsight Compute", Profile),
        Verb("sanitize", "run Compute Sanitizer over the checks of a kernel", Sanitize),
        Verb("wheel", "the kernels as a wheel for a released vLLM, compiled", Wheel),
        Verb("wheel-verify", "serve a model with a wheel in a fresh environment", WheelVerify),
        Verb("test", "run the tests", Test),
        Verb("image", "build the development container's image", Image, "container.image", False),
        Verb(
            "container", "start the development container, as VS Code does",
            Container, "container.start", False,
        ),
        Verb(
            "devcontainer", "what devcontainer.json runs before the container opens",
            BuildImage, "container.initialize", False, internal=True,
        ),
        Verb("shell", "a shell in the container, or one command", Shell, "container.shell", False),
        Verb(
            "snapshot", "save the container as an image that starts without compiling",
            Snapshot, "container.snapshot",
        ),
        Verb(
            "snapshots", "list the snapshots: size, date, versions, your commits",
            host="container.snapshots", lock=False,
        ),
        Verb(
            "snapshot-verify", "start a snapshot without a network and verify its contents",
            SnapshotVerify, "container.verify", False,
        ),
        Verb(
            "fork-status", "release, patches, commits not exported, uncommitted edits",
            Report, "fork.status", False,
        ),
        Verb("fork-diff", "everything that differs from the release", ForkDiff, "fork.diff", False),
        Verb("fork-export", "write your commits in vllm-fork/src as patches", ForkExport),
        Verb("fork-rebase", "rebase your commits onto another release", ForkRebase),
        Verb("upgrade", "rebase, set up and try another release beside this one", Upgrade),
        Verb(
            "inventory", "write inventory.json, which describes this machine for a bundle",
            host="environment.inventory", lock=False,
        ),
        Verb("bundle", "pack everything that a host without a network needs, in parts", Bundle),
        Verb(
            "unbundle", "on that host: check the parts, set everything up from them",
            Unbundle, "bundle.place",
        ),
        Verb("lint", "run every pre-commit hook"),
        Verb("lock", "make the locks and environment.yml from pins.toml", Lock),
        Verb("clean", "remove everything that can be regenerated; your edits stay", Clean, "clean"),
    )
}  # fmt: skip


def named(name: str = "") -> Verb:
    """The verb of that name.

    Raises:
        WorkspaceError: it does not exist.
    """
    if name not in VERBS:
        raise WorkspaceError(f"{name!r} is not a verb; see make help")
    return VERBS[name]
