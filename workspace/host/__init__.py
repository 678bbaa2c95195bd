# SPDX-License-Identifier: Apache-2.0
"""What every room stands on: errors, paths, files, git. Standard library only."""
