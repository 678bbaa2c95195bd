# SPDX-License-Identifier: Apache-2.0
"""Kernels as a wheel for production: no checkout, no compiler where it runs."""
