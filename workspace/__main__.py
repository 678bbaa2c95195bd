# SPDX-License-Identifier: Apache-2.0
import sys

from workspace import imports, release
from workspace.errors import WorkspaceError

try:
    imports.require_own(release.tree())
except WorkspaceError as error:
    if "doctor" not in sys.argv:
        sys.exit(f"error: {error}")
    imports.set_python_path_aside()  # the doctor's own packages must not come from there

from workspace.cli import main  # its packages are checked by now

main()
