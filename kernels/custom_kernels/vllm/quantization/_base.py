# SPDX-License-Identifier: Apache-2.0
"""What methods share that quantize an ordinary checkpoint while it is loaded.

A method is two classes: ``Config`` says what it needs and names its linear method; the linear
method turns a loaded weight into the tensors that stay (``quantize``) and multiplies by them
(``apply``). Embeddings, the output head, attention and experts stay as they are.

``apply`` is traced by torch.compile and captured in CUDA graphs: it calls torch ops and custom ops
and decides nothing by the values or the number of rows. Whatever is compiled or loaded for its
first call belongs into ``quantize``.
"""

from typing import Any, ClassVar

import torch

from custom_kernels import launches
from custom_kernels.vllm import upstream


class LinearMethod(upstream.UnquantizedLinearMethod):
    """Loads the weight as an unquantized layer does, whatever the number of ranks."""

    def __init__(self, config: "Config") -> None:
        super().__init__()
        self.config = config

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that take the place of this rank's weight [N, K], by the names that they get
        as the layer's parameters. The first one is what the kernel is called with."""
        raise NotImplementedError

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y [..., N] of x [..., K], in x's dtype."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        assert isinstance(layer.weight, torch.Tensor)
        self.keep(layer, self.quantize(layer.weight.data))

    def keep(self, layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Put ``tensors`` in the place of all of the layer's parameters but its bias."""
        for name, _ in list(layer.named_parameters(recurse=False)):
            if name != "bias":
                delattr(layer, name)
        for name, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
        multiplied = next(iter(tensors.values()))
        launches.layer(upstream.layer_name(layer), multiplied.data_ptr())


class Config(upstream.QuantizationConfig):
    """vLLM makes one for a model that is started with the method's name."""

    linear_method: ClassVar[type[LinearMethod]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)
    """Activations that the method takes."""
    min_capability: ClassVar[int] = 80
    """The oldest GPUs that it runs on: 80 for compute capability 8.0."""

    @classmethod
    def get_name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def get_min_capability(cls) -> int:
        return cls.min_capability

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Config":
        return cls()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(self.dtypes)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethod | None:
        if isinstance(layer, upstream.LinearBase):
            return self.linear_method(self)
        return None
