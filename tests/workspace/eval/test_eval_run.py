# SPDX-License-Identifier: Apache-2.0
"""`make eval` as a whole: the real engine, a model that was really trained."""

import shutil
from pathlib import Path

import pytest

from tests.language_model import LanguageModel
from tests.workspace.bench import sparse_folder
from workspace.eval import runner
from workspace.eval.record import Record
from workspace.verbs import Eval


@pytest.mark.engine
@pytest.mark.slow
def test_a_pruned_model_is_worse_than_its_source_and_the_record_proves_itself(
    tmp_path: Path,
    trained_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("RECORDS", "RUNS", "LOGS"):
        monkeypatch.setattr(runner, name, tmp_path / name.lower())
    monkeypatch.setattr(runner, "LOCK", tmp_path / "lock")
    shutil.copytree(trained_model.folder, tmp_path / trained_model.folder.name)
    folder = sparse_folder.write(trained_model.folder, tmp_path / "sparse", "int8")
    runner.run(Eval(str(folder), str(trained_model.held_out), tokens=2048))
    (path,) = (tmp_path / "records").glob("*.json")
    made = Record.model_validate_json(path.read_text())
    assert made.valid
    assert made.text.name == "held-out.txt"
    assert (made.text.tokens, made.text.windows) == (2048, 4)
    assert 5 < made.against.perplexity < 60
    assert made.comparison.interval[0] > 1.05
    assert made.against.launches == {}
    assert list(made.model.launches) == list(made.model.layers)
    (layers,) = made.model.layers.values()
    assert all(counts["sparse_gemm.reference"] > 0 for counts in layers.values())
    printed = capfd.readouterr().out
    assert "sparse (2:4 int8) against trained-qwen2 (unquantized)" in printed
    assert "time:     about " in printed
    assert "2/2 model: done in " in printed
    assert ": worse (95 % CI excludes 1)" in printed
    assert not list((tmp_path / "runs").iterdir())
