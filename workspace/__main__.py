# SPDX-License-Identifier: Apache-2.0
import os
import sys

from workspace.environment import imports
from workspace.host.errors import WorkspaceError
from workspace.pins import release

try:
    imports.require_own(release.tree())
except WorkspaceError as error:
    if "doctor" not in sys.argv:
        sys.exit(f"error: {error}")
    imports.set_python_path_aside()  # the doctor's own packages must not come from there

try:
    from workspace.cli import main
except ModuleNotFoundError as error:
    if os.environ.get("ENV") == "system":
        remedy = "give the PYTHON= that has it, or unpack a bundle made for this machine"
    else:
        remedy = f"rm {sys.prefix}/workspace.json && make dev"
    sys.exit(f"error: {sys.prefix} lacks the package {error.name}; {remedy}")

main()
