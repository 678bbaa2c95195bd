# SPDX-License-Identifier: Apache-2.0
"""What a result has to prove: tokens, launches, outputs.

Each check returns its failures as lines of text; an empty list is a pass.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

from workspace.bench import operations
from workspace.bench.messages import Generation, Ran, Result, Step
from workspace.bench.plan import Plan
from workspace.bench.provenance import Expected
from workspace.bench.record import Agreement
from workspace.host.text import some


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of log-probabilities in nats: of each token, and on average."""

    largest: float
    mean: float


TOLERANCES = {
    "float32": Tolerance(largest=0.02, mean=0.002),
    "float16": Tolerance(largest=0.25, mean=0.03),
    "bfloat16": Tolerance(largest=0.5, mean=0.06),
}
EIGHT_BITS = Tolerance(largest=1.75, mean=0.4)
"""Of two right kernels for the same weights that round activations to 8 bits, each its own way. For
a last bit of bfloat16 before that rounding, transformers of 2 to 48 layers with random weights
differ by 0.12 to 0.32 on average and by 1.4 at most (simulated); a 7B on an H200 by 0.21 and 0.95.
With other weights they differ by 0.6 and 2.9."""
FLAT = 4.0
"""The likeliest token must exceed a uniform guess by FLAT times the largest tolerated difference;
otherwise a kernel that returns zeros would pass."""


def tolerance(plan: Plan, dtype: str) -> Tolerance:
    """What is allowed between two variants with this dtype. On a CPU both round to 8 bits alike."""
    if plan.same_weights and plan.device.kind == "cuda":
        return EIGHT_BITS
    return TOLERANCES.get(dtype, TOLERANCES["bfloat16"])


def agreement(
    baseline: Sequence[Generation],
    candidate: Sequence[Generation],
    tolerance: Tolerance,
    vocab_size: int,
) -> Agreement:
    """Compare greedy outputs step by step.

    At each step up to and including the first different token, every token that is among the
    likeliest of either side is compared. A token that the other side does not list is at most as
    likely there as the last token listed, which bounds the difference from below. Two kernels that
    round differently may choose different tokens only where both sides agree, within the
    tolerance, that these are about equally likely.
    """
    failures = []
    differences: list[float] = []
    margins: list[float] = []
    tokens = matched = diverged = 0
    if [g.prompt for g in baseline] != [g.prompt for g in candidate] or not baseline:
        failures.append("outputs: the variants did not answer the same prompts")
    for old, new in zip(baseline, candidate, strict=False):
        if len(old.steps) != len(new.steps) or not old.steps:
            failures.append(f"outputs: {len(old.steps)} tokens against {len(new.steps)}")
        for old_step, new_step in zip(old.steps, new.steps, strict=False):
            tokens += 1
            differences += _differences(old_step, new_step)
            margins.append(max(old_step.logprobs.values()) + math.log(vocab_size))
            if old_step.token != new_step.token:
                diverged += 1
                break
            matched += 1
    largest = max(differences, default=math.nan, key=lambda d: math.inf if math.isnan(d) else d)
    mean = sum(differences) / len(differences) if differences else math.nan
    if not math.isfinite(mean):
        failures.append("outputs: a log-probability is not finite")
    elif largest > tolerance.largest or mean > tolerance.mean:
        failures.append(
            f"outputs: log-probabilities differ by up to {largest:.3g} and {mean:.3g} on average; "
            f"allowed are {tolerance.largest:g} and {tolerance.mean:g}"
        )
    elif median(margins) < FLAT * tolerance.largest:
        failures.append("outputs: all tokens are about equally likely, so agreement proves nothing")
    return Agreement(
        prompts=len(baseline),
        tokens=tokens,
        matched=matched,
        diverged=diverged,
        largest=largest,
        mean=mean,
        allowed_largest=tolerance.largest,
        allowed_mean=tolerance.mean,
        failures=failures,
    )


def steady(variant: Agreement, stock: Agreement | None) -> bool:
    """Whether a variant against itself agrees, or differs by at most twice what stock does: two
    engines do not compute the same bits, in 8 bits with random weights least of all."""
    if not variant.failures or stock is None:
        return not variant.failures
    differs = variant.largest > variant.allowed_largest or variant.mean > variant.allowed_mean
    close = variant.largest <= 2 * stock.largest and variant.mean <= 2 * stock.mean
    return len(variant.failures) == 1 and differs and close


def distance(
    baseline: Sequence[Generation], candidate: Sequence[Generation], vocab_size: int
) -> Agreement:
    """How far greedy outputs of a lossy variant are from those of stock. Any finite distance
    passes."""
    result = agreement(baseline, candidate, Tolerance(math.inf, math.inf), vocab_size)
    failures: list[str] = []
    if not math.isfinite(result.mean):
        failures = ["outputs: a log-probability is not finite"]
    return result.model_copy(update={"failures": failures, "lossy": True})


def tokens(plan: Plan, variant: str, result: Result) -> list[str]:
    """Every round processed the planned tokens, by vLLM's report and by the request outputs."""
    asked_in, asked_out = plan.input_tokens_per_round, plan.output_tokens_per_round
    slack = plan.slack * asked_in
    failures: list[str] = []
    if len(result.rounds) != plan.rounds:
        failures.append(f"{variant}: {len(result.rounds)} rounds measured, {plan.rounds} expected")
    for number, done in enumerate(result.rounds, 1):
        where = f"{variant}, round {number}"
        if abs(done.prompt_tokens - asked_in) > slack:
            failures.append(f"{where}: {done.prompt_tokens} prompt tokens, {asked_in} expected")
        if done.output_tokens != asked_out:
            failures.append(f"{where}: {done.output_tokens} new tokens, {asked_out} expected")
        total = done.prompt_tokens + done.output_tokens
        if done.reported_tokens not in (None, total):
            failures.append(f"{where}: vLLM reports {done.reported_tokens} tokens, not {total}")
    return failures


def same_prompts(baseline: Result, candidate: Result) -> list[str]:
    """Round by round, both variants got the same number of prompt tokens."""
    old, new = ([r.prompt_tokens for r in result.rounds] for result in (baseline, candidate))
    return [] if old == new else ["the variants processed different prompt tokens"]


def unchanged(results: Sequence[Ran], launching: Sequence[Ran]) -> list[str]:
    """Nothing was edited or installed between the first and the last process.

    Args:
        results: of all processes.
        launching: of those that ran custom kernels; only for them do edited kernels matter.
    """
    folders = {r.vllm_folder for r in results}
    changed = {
        "installed versions": len({tuple(sorted(r.environment.items())) for r in results}) > 1,
        "vLLM's sources": len({(r.vllm_folder, r.vllm_files) for r in results}) > len(folders),
        "the kernels' sources": len({r.kernels_source_hash for r in launching}) > 1,
    }
    return [f"{what} changed during the run; re-run" for what, yes in changed.items() if yes]


def launches(plan: Plan, variant: str, result: Ran, expected: bool) -> list[str]:
    """The custom kernel ran in every worker process, or, for stock, in none.

    Args:
        expected: whether this variant is to launch custom kernels.
    """
    counted = result.launches
    if not expected:
        if not counted:
            return []
        return [
            f"{variant}: launched custom kernels ({dict(result.total_launches())}), it must not"
        ]
    # A name without a backend is the beginning of those of all its backends; a method may run any.
    wanted = [f"{name}.{backend or ''}" for name, backend in plan.operations.items()]
    failures = []
    for beginning in [""] if plan.method else wanted:
        what, remedy = beginning.rstrip("."), f"has {plan.model.name} such layers? make ops"
        if plan.method:
            what, remedy = "a custom kernel", f"does {plan.method} count its launches?"
        elif beginning.startswith(f"{operations.GEMM}."):
            remedy = "is the fork patched? run make doctor"
        ran = [pid for pid, counts in counted.items() if _ran(counts, beginning)]
        # Not every pipeline stage has a layer that LAYERS names; `layers` looks at those that have.
        fewest = plan.tensor_parallel if plan.layers else plan.workers
        if len(ran) not in range(fewest, plan.workers + 1, plan.tensor_parallel):
            failures.append(
                f"{variant}: {what} ran in {len(ran)} of {plan.workers} worker processes; {remedy}"
            )
    others = {
        one for counts in counted.values() for one in counts if not one.startswith(tuple(wanted))
    }
    if others and not plan.method:
        failures.append(f"{variant}: {', '.join(sorted(others))} ran as well")
    return failures


def _ran(counts: dict[str, int], beginning: str) -> bool:
    return any(count > 0 for name, count in counts.items() if name.startswith(beginning))


def layers(patterns: str, variant: str, result: Ran) -> list[str]:
    """In every worker process, the layers that ran a custom kernel are those that a pattern
    matches."""
    failures = []
    for counted in result.layers.values():
        wanted = {name for one in split_patterns(patterns) for name in matching(one, counted)}
        ran = {name for name, counts in counted.items() if any(counts.values())}
        for names, what in (
            (wanted - ran, "did not run a custom kernel"),
            (ran - wanted, "ran a custom kernel and matches no pattern"),
        ):
            if names:
                more = f" and {len(names) - 1} others" if len(names) > 1 else ""
                failures.append(f"{variant}: layer {min(names)}{more} {what}")
    if len(result.layers) < len(result.launches):
        failures.append(f"{variant}: a process launched kernels and named no layers")
    return failures


def split_patterns(patterns: str) -> list[str]:
    return [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if fnmatchcase(name, pattern)}


def _is_in(module: Path, folder: Path) -> bool:
    """Whether a top-level module is from a folder of the module path. What is a link there counts:
    Debian's sitecustomize, or a package of the host (environment/host_packages.py)."""
    return any(parent.resolve().is_relative_to(folder) for parent in module.parents[:2])


def imports(variant: str, result: Ran, tree: Path, expected: Expected) -> list[str]:
    """The process ran vLLM from `tree`, this checkout's kernels, and the locked packages."""
    failures = []
    for name, folder in (("vllm", tree), ("custom_kernels", expected.kernels)):
        file = Path(result.modules.get(name, "nowhere")).resolve()
        if not file.is_relative_to(folder.resolve() / name):
            failures.append(f"{variant}: ran {name} from {file.parent}, not from {folder}")
    others = [
        f"{name} from {file}"
        for name, file in sorted(result.modules.items())
        if name in expected.modules - {"vllm", "custom_kernels"}
        and not any(_is_in(Path(file), path) for path in expected.paths)
    ]
    if others:
        failures.append(
            f"{variant}: imported {some(others)} instead of the environment's; is PYTHONPATH "
            "set, or something in the user's site-packages?"
        )
    wrong = [
        f"{name} {result.packages.get(name, 'missing')} (locked: {version})"
        for name, version in sorted(expected.versions.items())
        if result.packages.get(name) != version
    ]
    if wrong:
        failures.append(f"{variant}: packages are not as locked: {some(wrong)}; run make dev")
    return failures


def _differences(old: Step, new: Step) -> list[float]:
    differences = []
    for one, other in ((old.logprobs, new.logprobs), (new.logprobs, old.logprobs)):
        floor = min(other.values())
        for token, value in one.items():
            if token not in other:
                differences.append(max(0.0, value - floor))
            elif one is old.logprobs:  # listed by both sides: counted once
                differences.append(abs(value - other[token]))
    return differences
