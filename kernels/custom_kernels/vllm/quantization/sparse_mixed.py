# SPDX-License-Identifier: Apache-2.0
"""``--quantization sparse_mixed``: half of the rows pruned to 2:4, 8 bits. See ``_sparse.py``."""

from custom_kernels.vllm.quantization._sparse import SparseConfig


class Config(SparseConfig):
    pattern = "mixed"
