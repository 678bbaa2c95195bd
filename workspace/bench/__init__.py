# SPDX-License-Identifier: Apache-2.0
"""`make bench`: vLLM's own benchmark, two variants, one record that proves itself."""
