# SPDX-License-Identifier: Apache-2.0
"""Check the outputs of backends against the exact result, called and replayed."""
