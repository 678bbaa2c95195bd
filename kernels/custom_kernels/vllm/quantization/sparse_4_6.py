# SPDX-License-Identifier: Apache-2.0
"""``--quantization sparse_4_6``: linear layers pruned to 4:6, 8 bits. See ``_sparse.py``."""

from custom_kernels.vllm.quantization._sparse import SparseConfig


class Config(SparseConfig):
    pattern = "4:6"
