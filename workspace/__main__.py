# SPDX-License-Identifier: Apache-2.0
"""Run a verb in the environment: `python -m workspace VERB`, as bootstrap does."""

import sys

from workspace.environment import imports
from workspace.host import settings
from workspace.host.errors import WorkspaceError, reported_in_one_line
from workspace.pins import release


def main() -> int:
    try:
        imports.require_unshadowed(release.tree())
    except WorkspaceError:
        if sys.argv[1:] != ["doctor"]:
            raise
        imports.drop_python_path()  # the doctor itself must not import from there
    try:
        from workspace import cli

        return cli.main(sys.argv[1:])
    except ModuleNotFoundError as error:
        if settings.current().mode == "system":
            remedy = "set PYTHON= to one with it, or unpack a bundle made for this machine"
        else:
            remedy = f"rm {sys.prefix}/workspace.json && make dev"
        raise WorkspaceError(f"{sys.prefix} lacks the package {error.name}; {remedy}") from None


with reported_in_one_line():
    sys.exit(main())
