# SPDX-License-Identifier: Apache-2.0
"""The tables of figures in pages say what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from workspace.host.paths import ROOT
from workspace.report import tables


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_of_a_page_are_those_of_the_records(path: Path) -> None:
    page = path.read_text()
    assert page.count("<!-- records: ") == page.count("<!-- end -->") > 0
    assert tables.render(path) == page, f"run: {tables.COMMAND}"
