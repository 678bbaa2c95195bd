# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of every kernel, for GPUs that need not be there."""
