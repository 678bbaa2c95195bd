# SPDX-License-Identifier: Apache-2.0
"""The options of `make eval` with every default filled in: two models, a text, its windows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from workspace.bench import models, workload
from workspace.bench.checkpoint import PRECISIONS
from workspace.bench.messages import Stage
from workspace.bench.models import Model
from workspace.bench.plan import Baseline, Device, Plan, make_plan
from workspace.bench.record import DeviceKind
from workspace.bench.variants import Variant, baseline, custom
from workspace.eval import text
from workspace.eval.messages import STAGES
from workspace.eval.text import Text
from workspace.host.errors import WorkspaceError
from workspace.host.text import make_command
from workspace.pins import release
from workspace.verbs import Bench, Eval

MODEL, AGAINST = "model", "against"
"""Names of the sides."""


class Sizes(NamedTuple):
    """Tokens of a text, of a window, and windows that are scored at once."""

    tokens: int
    window: int
    at_once: int


SIZES: dict[DeviceKind, Sizes] = {"cpu": Sizes(16384, 512, 1), "cuda": Sizes(262144, 2048, 16)}
"""2048 is the window of published tables. On a CPU the logits of so many tokens take gigabytes."""
FEWER_TOKENS = (8192, 4096, 2048, 1024, text.FEWEST_TOKENS)
"""Tried on the CPU after the default, from many to few."""
FITTED_SECONDS = 240.0
"""For both sides, by estimate."""


@dataclass(frozen=True)
class Side:
    """A model as vLLM loads it; `plan` is that of a benchmark of it."""

    name: str
    plan: Plan
    variant: Variant

    @property
    def model(self) -> Model:
        return self.variant.model or self.plan.model

    @property
    def quantized(self) -> str | None:
        """How its weights are loaded in 8 bits; None if they are not."""
        if self.plan.same_weights and not self.variant.launches:
            return f"{self.plan.baseline}, dense"
        if self.variant.launches and self.plan.quantization:
            return self.plan.quantization
        if self.variant.arguments:
            return self.plan.baseline
        return self.model.quantized.label if self.model.quantized else None


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated against what, on which windows of tokens."""

    against: Side
    model: Side
    text: Text
    tokens: int
    window: int
    windows: list[list[int]]
    at_once: int
    expected: Mapping[Stage, float]
    """Estimated seconds of each stage of a process, for "scoring" of `at_once` windows; may be
    empty."""
    command: str
    """Repeats it, every default written out."""

    @property
    def steps(self) -> int:
        """Steps of "scoring" in a process."""
        return -(-len(self.windows) // self.at_once)

    @property
    def seconds(self) -> float | None:
        """Estimated, for both processes; None if unknown."""
        if not self.expected:
            return None
        steps = {"scoring": self.steps}
        return 2 * sum(self.expected[stage] * steps.get(stage, 1) for stage in STAGES)

    @property
    def same_weights(self) -> bool:
        """Whether both sides have the same 8-bit weights, one of them as dense ones."""
        return self.model.plan.same_weights and self.against.plan is self.model.plan


def prepare(options: Eval, device: Device) -> Evaluation:
    """Resolve the models, read the text and fit its length.

    Raises:
        WorkspaceError: what cannot be evaluated, and why.
    """
    model = models.resolve(options.model, device.kind)
    _require_real(model, "MODEL")
    sizes = SIZES[device.kind]
    against, candidate = _sides(options, device, model, sizes)
    content, plan = text.read(options.text_file), candidate.plan
    expected: dict[Stage, float] = {}
    if device.kind == "cpu":
        expected = _expected(plan, workload.speed_of(model))
    for most in (options.tokens,) if options.tokens else (sizes.tokens, *FEWER_TOKENS):
        ids, begin = text.tokens(content, candidate.model, most)
        made = Evaluation(
            against=against,
            model=candidate,
            text=content,
            tokens=len(ids),
            window=plan.input_len,
            windows=text.windows(ids, begin, plan.input_len),
            at_once=plan.num_prompts,
            expected=expected,
            command=_command(options, model, len(ids), plan.tensor_parallel),
        )
        if (made.seconds or 0.0) <= FITTED_SECONDS:
            break
    if text.tokens(content, against.model, made.tokens) != (ids, begin):
        raise WorkspaceError(
            f"{against.model.name} and {model.name} have different tokenizers, so their "
            "perplexities cannot be compared; name another model with AGAINST"
        )
    return made


def _sides(options: Eval, device: Device, model: Model, sizes: Sizes) -> tuple[Side, Side]:
    """AGAINST and MODEL."""
    other: Model | None = None
    precision = next((one for one in PRECISIONS.values() if one == options.against), None)
    wanted: Baseline | None = precision
    if precision:
        stored = model.quantized.precision if model.quantized else precision
        if stored != precision:
            raise WorkspaceError(
                f"AGAINST={precision}: the weights of {model.name} are {stored}; use "
                f"AGAINST={stored}, or name a model"
            )
    elif options.against:
        wanted, other = "bf16", _resolve_against(options.against, device)
        _require_real(other, "AGAINST")
    elif model.pattern:
        wanted = "bf16"
        model = replace(model, converted_from=models.original(model, device.kind))
    if other is None and not (model.pattern or options.quantization):
        raise WorkspaceError(
            f"MODEL={model.name}: it is not sparse, so it has no dense model of its own to be "
            "compared with; add QUANTIZATION= (as sparse_2_4), or AGAINST= (another model)"
        )
    longest = min(one.config.max_position_embeddings for one in (model, other or model))
    asked = Bench(
        quantization=options.quantization,
        tp=options.tp,
        input_len=min(sizes.window, longest - 1),
        output_len=1,
        num_prompts=sizes.at_once,
        baseline=wanted,
    )
    plan = make_plan(asked, device, model)
    candidate = Side(MODEL, plan, _as_it_is(MODEL, plan))
    if other is None:
        return Side(AGAINST, plan, replace(baseline(plan), name=AGAINST)), candidate
    against = make_plan(replace(asked, quantization=None), device, other)
    return Side(AGAINST, against, _as_it_is(AGAINST, against)), candidate


def _resolve_against(name: str, device: Device) -> Model:
    try:
        return models.resolve(name, device.kind)
    except WorkspaceError as error:
        error.args = (str(error).replace("MODEL=", "AGAINST=", 1),)
        raise


def _as_it_is(name: str, plan: Plan) -> Variant:
    """The plan's model with its quantization method, if it has one, and vLLM's own kernels if
    not."""
    return replace(custom(plan), name=name) if plan.method else Variant(name)


def _expected(plan: Plan, speed: workload.Speed) -> dict[Stage, float]:
    """Seconds of each stage of a process on the CPU; the output head multiplies every token."""
    tokens = plan.input_tokens_per_round
    # Averaged: as in a benchmark, one side runs the reference.
    scoring = workload.step_seconds(plan.model, speed, 0.5 if plan.method else 0.0, tokens, tokens)
    return workload.estimate(plan, speed) | {"scoring": scoring}


def _require_real(model: Model, option: str) -> None:
    if model.weights != "real":
        raise WorkspaceError(
            f"{option}={model.name}: it has {model.weights} weights, which have no quality; pass a "
            "folder with trained weights"
        )


def _command(options: Eval, model: Model, tokens: int, tensor_parallel: int) -> str:
    return make_command(
        "eval",
        MODEL=model.requested_path or model.name,
        TEXT=options.text_file,
        QUANTIZATION=options.quantization,
        AGAINST=options.against,
        TOKENS=tokens,
        TP=tensor_parallel,
        VLLM_VERSION=release.to_repeat(),
    )
