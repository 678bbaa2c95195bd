# SPDX-License-Identifier: Apache-2.0
"""The conflict at which a rebase stopped, as text: every place in three versions."""

from __future__ import annotations

import re

from workspace.fork import patch_queue
from workspace.fork.rebase_state import Rebase, conflicts
from workspace.fork.tree_state import shown

STYLE = ("-c", "merge.conflictStyle=diff3")
"""With it git writes into a file also what was there before both changes."""
PLACE = re.compile(
    r"^<{7} .*\n(?P<new>(?s:.*?))^\|{7} .*\n(?P<old>(?s:.*?))^={7}\n(?P<commit>(?s:.*?))^>{7} .*\n",
    re.MULTILINE,
)


def title(rebase: Rebase, commit: str) -> str:
    """The commit, and the patch that it is exported as, if it is."""
    subject = patch_queue.subject(rebase.tree, commit)
    patches = patch_queue.files(rebase.origin)
    names = [shown(one) for one in patches if patch_queue.read_file(one).subject == subject]
    return ", ".join([patch_queue.short(rebase.tree, commit), *names])


def places(rebase: Rebase, commit: str) -> str:
    """Each place that is not resolved: file and line; the new release's lines, the old one's, and
    those that `commit` makes of them."""
    titles = {
        "new": f"vLLM {rebase.target}",
        "old": f"vLLM {rebase.origin}",
        "commit": title(rebase, commit),
    }
    lines: list[str] = []
    for name in conflicts(rebase.tree):
        path = rebase.tree / name
        text = path.read_text(errors="replace") if path.is_file() else ""
        for place in PLACE.finditer(text):
            lines.append(f"{name}:{text.count(chr(10), 0, place.start()) + 1}")
            for version, heading in titles.items():
                found = place[version].splitlines() or ["(nothing)"]
                lines += [f"  {heading}:", *(f"    {line}" for line in found)]
    return "\n".join(lines)
