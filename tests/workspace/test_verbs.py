# SPDX-License-Identifier: Apache-2.0
"""Makefile, command line and reference have what the table of verbs says."""

from __future__ import annotations

import re
import subprocess

import pytest

from workspace import cli, reference, verbs
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.verbs import VERBS, Verb

PUBLIC = [verb for verb in VERBS.values() if not verb.internal]
ENVIRONMENT = [verb for verb in PUBLIC if not verb.host]
MAKEFILE = (ROOT / "Makefile").read_text()


def name(verb: Verb) -> str:
    return verb.name


def test_the_makefile_has_the_verbs_in_the_order_of_the_table() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
    assert targets == ["help", *map(name, PUBLIC)]
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony.split() == targets


@pytest.mark.parametrize("verb", PUBLIC, ids=name)
def test_a_line_of_the_makefile_is_the_help_of_the_table(verb: Verb) -> None:
    usage = f" ({verb.usage})" if verb.usage else ""
    assert f"\n{verb.name}: ## {verb.help}{usage}\n\t@$(WORKSPACE) {verb.name}\n" in MAKEFILE


def test_make_help_lists_every_verb() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for verb in PUBLIC:
        assert f"make {verb.name} " in listed


def test_every_verb_of_the_environment_has_a_function_and_no_other() -> None:
    assert list(cli.RUN) == [verb.name for verb in ENVIRONMENT]


def test_a_verb_of_the_host_has_its_module() -> None:
    for verb in VERBS.values():
        module = ROOT / "workspace" / f"{verb.host.replace('.', '/')}.py"
        assert not verb.host or module.exists(), verb.name


def test_the_reference_is_made_from_the_table() -> None:
    page = reference.PAGE.read_text()
    assert reference.render(page) == page, f"run: {reference.COMMAND}"
    for table in (reference.verbs, reference.settings, reference.options):
        assert "\n".join(table()) in page


def test_a_verb_that_does_not_exist_is_one_line() -> None:
    for wrong in ((), ("bnech",)):
        with pytest.raises(WorkspaceError, match="is not a verb; see make help"):
            verbs.named(*wrong)
