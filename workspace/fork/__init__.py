# SPDX-License-Identifier: Apache-2.0
"""The vLLM fork: its tree, patches, builds and installation."""
