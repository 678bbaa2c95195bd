# SPDX-License-Identifier: Apache-2.0
"""The one error that verbs raise on purpose."""


class WorkspaceError(Exception):
    """Something the user can act on.

    The message is one line: what happened, where, and what to run or change.
    The command line prints it without a traceback and exits with status 1.
    """
