# SPDX-License-Identifier: Apache-2.0
"""pins.toml, and the vLLM release that a verb works on."""
