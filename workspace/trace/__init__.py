# SPDX-License-Identifier: Apache-2.0
"""`make trace`: where a step of vLLM's engine spends its time."""
