# SPDX-License-Identifier: Apache-2.0
"""The development container: its image, the container itself, and snapshots of it.

Everything in here but `restore` and `self_test` runs on the host, where there may be nothing but
Python and Docker's client: standard library only.
"""
