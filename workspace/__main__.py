# SPDX-License-Identifier: Apache-2.0
from workspace.cli import main

main()
