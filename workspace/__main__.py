# SPDX-License-Identifier: Apache-2.0
"""A verb in the environment: `python -m workspace VERB`, as bootstrap starts it."""

import sys

from workspace.environment import imports
from workspace.host import settings
from workspace.host.errors import WorkspaceError, reported_in_one_line
from workspace.pins import release


def main() -> int:
    try:
        imports.require_own(release.tree())
    except WorkspaceError:
        if sys.argv[1:] != ["doctor"]:
            raise
        imports.set_python_path_aside()  # the doctor's own packages must not come from there
    try:
        from workspace import cli

        return cli.main(sys.argv[1:])
    except ModuleNotFoundError as error:
        if settings.current().mode == "system":
            remedy = "set PYTHON= to one that has it, or unpack a bundle made for this machine"
        else:
            remedy = f"rm {sys.prefix}/workspace.json && make dev"
        raise WorkspaceError(f"{sys.prefix} lacks the package {error.name}; {remedy}") from None


with reported_in_one_line():
    sys.exit(main())
