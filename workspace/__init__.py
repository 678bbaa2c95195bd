# SPDX-License-Identifier: Apache-2.0
"""The code behind the Makefile: one module per verb."""
