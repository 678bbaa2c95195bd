# SPDX-License-Identifier: Apache-2.0
"""VS Code's tasks and launch entries call what there is."""

from __future__ import annotations

import json
import re
from typing import Any

from workspace import cli
from workspace.host.options import declared
from workspace.host.paths import ROOT
from workspace.verbs import VERBS

KERNEL = "${fileDirnameBasename}.${fileBasenameNoExtension}"
"""The kernel in the editor, in VS Code's variables."""


def read(name: str) -> Any:
    """A file of .vscode: JSON, with comments on lines of their own."""
    text = (ROOT / ".vscode" / name).read_text()
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def test_every_verb_has_a_task_whose_variables_are_its_options() -> None:
    found = read("tasks.json")
    inputs = {one["id"]: one for one in found["inputs"]}
    used = set()
    for task in found["tasks"]:
        name, *values = task["args"]
        verb = VERBS[name]
        assert task["label"].partition(",")[0] == f"make {name}"
        assert task["detail"] == verb.help
        options = {option.variable: option for _, option in declared(verb.options)}
        for variable, _, value in (one.partition("=") for one in values):
            if value == f"${{input:{variable}}}":
                used.add(variable)
                choices = inputs[variable].get("options", [])
                assert tuple(choices) == options[variable].values
            else:
                assert (variable, value) == ("K", KERNEL)
                assert "K" in options
    assert used == set(inputs)
    public = {verb.name for verb in VERBS.values() if not verb.internal}
    assert {task["args"][0] for task in found["tasks"]} == public


def test_an_error_of_nvcc_leads_to_its_line() -> None:
    (task,) = (one for one in read("tasks.json")["tasks"] if one["label"] == "make kernels")
    found = re.fullmatch(
        task["problemMatcher"]["pattern"]["regexp"],
        '/a b/gemm/mine.cu(12): error: identifier "m" is undefined',
    )
    assert found
    assert found.groups() == ("/a b/gemm/mine.cu", "12", "error", 'identifier "m" is undefined')


def test_the_launch_entries_run_a_kernels_tests_and_the_verbs() -> None:
    found = read("launch.json")
    tests = next(one for one in found["configurations"] if "kernel" in one["name"])
    kernel = tests["args"][2].replace("${fileDirnameBasename}", "gemm")
    kernel = kernel.replace("${fileBasenameNoExtension}", "triton")
    assert ["-k", kernel] == cli.pytest_arguments("gemm.triton")
    (verb,) = found["inputs"]
    assert verb["options"] == list(cli.RUN)


def test_settings_for_any_machine_name_no_place() -> None:
    assert "path" not in " ".join(read("settings.json")).lower()
