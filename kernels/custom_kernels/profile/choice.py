# SPDX-License-Identifier: Apache-2.0
"""Which call is profiled: a backend, and a case of its operation."""

from dataclasses import dataclass

from custom_kernels import registry
from custom_kernels.bench.plan import choose, known, known_models
from custom_kernels.check.case import Case


@dataclass(frozen=True)
class Choice:
    """What a user named; None stands for the default."""

    operation: str
    backend: str = ""
    """Empty: the best for the device."""
    model: str | None = None
    """The last of those measured by default."""
    layer: str | None = None
    """The first of the model."""
    tokens: int = 4096
    """M."""
    pattern: str | None = None
    """Of sparsity; the first."""
    dtype: str | None = None
    """The operation's first."""

    def case(self) -> Case:
        """The one case of this choice.

        Raises:
            UsageError: there is none; names the values that exist.
        """
        cases = registry.operation(self.operation).cases
        models = known_models([self.model or cases.DEFAULT_MODELS[-1]], cases.MODELS)
        found = cases.cases(models, [self.tokens], self.dtype_name())
        for label in ("layer", "pattern"):
            found = choose(found, label, filter(None, [getattr(self, label)]))
        return found[0]

    def dtype_name(self) -> str:
        """The dtype. Raises UsageError if the operation has no such case."""
        dtypes = registry.operation(self.operation).cases.DTYPES
        (dtype,) = known("dtype", [self.dtype or dtypes[0]], dtypes)
        return dtype

    def words(self) -> list[str]:
        """The arguments of the command line that make this choice."""
        words = [self.operation]
        for name in ("backend", "model", "layer", "tokens", "pattern", "dtype"):
            value = getattr(self, name)
            words += [f"--{name}", str(value)] if value else []
        return words
