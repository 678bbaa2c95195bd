# SPDX-License-Identifier: Apache-2.0
"""`make eval`: what a sparse model loses, as perplexity of a text in vLLM's own engine."""
