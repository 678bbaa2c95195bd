# SPDX-License-Identifier: Apache-2.0
"""`make bundle` and `make unbundle`: the workspace on a GPU host without a network."""
