# SPDX-License-Identifier: Apache-2.0
"""`make upgrade`: the fork on another vLLM release, proven step by step beside the old one."""
