# SPDX-License-Identifier: Apache-2.0
"""``--quantization sparse_6_8``: linear layers pruned to 6:8, 8 bits. See ``_sparse.py``."""

from custom_kernels.vllm.quantization._sparse import SparseConfig


class Config(SparseConfig):
    pattern = "6:8"
