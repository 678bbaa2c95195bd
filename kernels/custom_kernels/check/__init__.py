# SPDX-License-Identifier: Apache-2.0
"""Is a backend right? Its outputs against the exact result, called and replayed."""
