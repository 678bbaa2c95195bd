# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernels package: one file per operation and per module."""
