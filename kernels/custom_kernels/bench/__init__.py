# SPDX-License-Identifier: Apache-2.0
"""Times of backends against baselines, their records, and comparisons of two records."""
