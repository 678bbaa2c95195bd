# SPDX-License-Identifier: Apache-2.0
"""Python, uv, conda, the package index: the environment that everything else runs in."""
