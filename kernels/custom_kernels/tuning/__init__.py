# SPDX-License-Identifier: Apache-2.0
"""Keep what a benchmark showed, where ``custom_kernels.tuned`` looks it up."""
