# SPDX-License-Identifier: Apache-2.0
"""Verbs that are killed, or whose disk gets full or read-only, at random moments.

Nothing of the user's may be lost, nothing half made may be taken for whole, and the same command,
run again, ends as if nothing had happened.

    .venv/bin/python -m tests.kills --faults 1000
"""
