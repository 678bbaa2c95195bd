# SPDX-License-Identifier: Apache-2.0
"""`make convert`: a Hugging Face checkpoint, pruned to a pattern and quantized to 8 bits."""
