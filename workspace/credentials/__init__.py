# SPDX-License-Identifier: Apache-2.0
"""Find credentials before they become part of an image or a bundle."""
