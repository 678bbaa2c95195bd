# SPDX-License-Identifier: Apache-2.0
"""Is a backend fast? Times against baselines, their records, and what two records say."""
