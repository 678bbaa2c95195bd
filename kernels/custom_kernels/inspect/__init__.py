# SPDX-License-Identifier: Apache-2.0
"""What the compilers make of every kernel; needs no GPU."""
