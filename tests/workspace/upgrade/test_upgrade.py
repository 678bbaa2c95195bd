# SPDX-License-Identifier: Apache-2.0
"""make upgrade on small releases, with the real git, uv and nvcc; no engine comes of those."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pypi_simple import DistributionPackage

from tests.workspace.conftest import CHANGED, NEW, OLD, Checkout
from workspace.host.errors import WorkspaceError
from workspace.host.paths import ROOT
from workspace.upgrade import names, report, steps, upgrade
from workspace.upgrade.steps import Step, Steps

DEFAULT = "from workspace.upgrade import default; default.make({!r})"


@pytest.fixture
def fork(ready_checkout: Checkout) -> Iterator[Checkout]:
    """A small checkout with a commit of the user's; what an upgrade leaves is removed after."""
    fork = ready_checkout
    (fork.src / "vllm/mine.py").write_text("mine = 1\n")
    fork.git("add", "--all")
    fork.git("commit", "-q", "-m", "Mine")
    yield fork
    for path in fork.root.glob("environment*.yml"):
        path.unlink()


def page(fork: Checkout) -> str:
    return (fork.root / ".workspace/upgrade" / f"{NEW}.md").read_text()


def test_what_fails_where_is_in_the_report_and_the_old_release_is_as_it_was(
    fork: Checkout,
) -> None:
    """The releases here have no engine, and none of vLLM's modules."""
    before = fork.git("rev-parse", "HEAD"), os.readlink(fork.src)
    lock = (fork.root / f"locks/vllm-{OLD}.txt").read_bytes()
    made = fork.make("upgrade", f"VERSION={NEW}", "DEFAULT=1")
    assert made.returncode != 0
    assert "Traceback" not in made.stdout
    assert f"vLLM {NEW} cannot become the default release: names, bench" in made.stdout
    text = page(fork)
    assert "| ✓ | patches | 2 patches without a conflict, 2 lines added |" in text
    assert "| ✓ | packages |" in text
    assert "| ✗ | names | of " in text
    assert "vllm.config.LoadConfig (used in workspace/bench/dummy_weights.py)" in text
    assert "| ✓ | kernels |" in text
    assert "| ✗ | bench |" in text
    patches = (fork.root / "vllm-fork/patches" / NEW).iterdir()
    assert sorted(path.name for path in patches) == ["0001-add-a-line.patch", "0002-mine.patch"]
    assert (fork.root / f".venv-{NEW}").exists()
    assert (fork.git("rev-parse", "HEAD"), os.readlink(fork.src)) == before
    assert (fork.root / f"locks/vllm-{OLD}.txt").read_bytes() == lock
    assert f'default = "{OLD}"' in (fork.root / "pins.toml").read_text()


def test_a_conflict_is_what_came_of_the_patches_and_the_verb_goes_on_after_it(
    fork: Checkout,
) -> None:
    (fork.src / "vllm/kept.py").write_text("mine = True\n")
    fork.git("commit", "-qam", "Conflict")
    stopped = fork.make("upgrade", f"VERSION={NEW}")
    assert stopped.returncode != 0
    assert f"vLLM {NEW} has conflicts" in stopped.stdout
    for line in ("vllm/kept.py:1", f"vLLM {OLD}:", CHANGED["vllm/kept.py"].strip()):
        assert f"    {line}" in page(fork) or f"      {line}" in page(fork)
    assert os.readlink(fork.src) == f"releases/{NEW}"
    (fork.src / "vllm/kept.py").write_text("both = True\n")
    fork.git("add", "vllm/kept.py")
    fork.make("upgrade")
    assert "| ✓ | patches | 3 patches without a conflict" in page(fork)
    assert os.readlink(fork.src) == f"releases/{OLD}"
    made = [fork.python, "-c", DEFAULT.format(NEW)]
    subprocess.run(made, cwd=fork.root, env=fork.env, check=True)
    assert f'[vllm]\ndefault = "{NEW}"' in (fork.root / "pins.toml").read_text()
    assert f"locks/vllm-{NEW}.txt" in (fork.root / "environment.yml").read_text()
    assert f"locks/vllm-{OLD}.txt" in (fork.root / f"environment-{OLD}.yml").read_text()


def test_the_release_in_use_is_no_upgrade(fork: Checkout) -> None:
    said = fork.make("upgrade", f"VERSION={OLD}").stdout
    assert f"error: vLLM {OLD} is in use already; name another release" in said


def test_the_newest_release_has_an_sdist_and_is_no_trial() -> None:
    files = [
        DistributionPackage("", "", "vllm", version, kind, {}, None, None, is_yanked=yanked)
        for version, kind, yanked in (
            ("0.9.2", "sdist", False), ("0.33.0", "sdist", False), ("0.34.0rc1", "sdist", False),
            ("0.35.0", "wheel", False), ("0.36.0", "sdist", True),
        )
    ]  # fmt: skip
    assert upgrade.newest(files) == "0.33.0"


def test_steps_that_were_done_are_not_done_again_unless_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "FOLDER", tmp_path)
    calls: list[str] = []

    def action(name: str) -> Step:
        calls.append(name)
        return Step(name, "ok", "done", ("a line",))

    killed = Steps("1.0", done=[Step("patches", "ok", "carried")])
    killed.resume("one")
    killed.do("names", lambda: action("names"))
    for key, called in (("one", ["names", "bench"]), ("other", ["names", "bench"] * 2)):
        resumed = Steps("1.0", done=[Step("patches", "ok", "carried")])
        resumed.resume(key)
        for name in ("names", "bench"):
            done = resumed.do(name, lambda name=name: action(name))
            assert (done.detail, done.more) == ("done", ("a line",))
        assert [step.name for step in resumed.done] == ["patches", "names", "bench"]
        if key == "one":
            assert calls == called
    assert calls == ["names", "bench", "names", "bench"]
    assert resumed.passed
    resumed.end()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_verb_that_runs_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps, "STATE", tmp_path)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace/bootstrap.py").write_text(
        "import os, pathlib, signal, time\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n"
    )
    with pytest.raises(WorkspaceError, match="interrupted by SIGTERM; to go on where it was"):
        steps.verb("1.0", "bench")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_release_of_which_something_could_not_be_tried_cannot_become_the_default() -> None:
    tried = Steps("1.0", done=[Step("names", "ok", "there"), Step("bench", "skipped", "no wheel")])
    assert not tried.passed
    assert "bench could not be done here" in report.verdict(tried)
    assert "DEFAULT=1" in report.verdict(Steps("1.0", done=[Step("names", "ok", "there")]))


def test_names_of_vllm_are_found_where_they_are_used_and_where_they_went(tmp_path: Path) -> None:
    ours, tree = tmp_path / "ours", tmp_path / "tree"
    for path, text in {
        ours / "one.py": (
            "from vllm.layers import Linear, gone, moved\nfrom vllm import envs\n"
            "import vllm.layers\nenvs.SWITCH, envs.lazy, envs.absent\n"
            "kind = getattr(envs, 'new', None) or envs.old\n"
        ),
        ours / "releases.py": "from vllm.layers import asked\n",
        tree / "vllm/__init__.py": "",
        tree / "vllm/envs.py": "SWITCH: int = 1\ndef __getattr__(name):\n    return {'lazy': 1}\n",
        tree / "vllm/layers/__init__.py": "if True:\n    from vllm.layers.linear import Linear\n",
        tree / "vllm/layers/linear.py": "class Linear: ...\ndef moved(): ...\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    used = names.used(tree, [ours])
    assert [str(name).removeprefix("vllm.") for name in used] == [
        "envs.SWITCH", "envs.absent", "envs.lazy", "layers.Linear", "layers.gone", "layers.moved",
    ]  # fmt: skip
    assert [str(one) for one in names.missing(tree, used)] == [
        "vllm.envs.absent (used in one.py): defined nowhere",
        "vllm.layers.gone (used in one.py): defined nowhere",
        "vllm.layers.moved (used in one.py): now in vllm.layers.linear",
    ]


def test_the_tests_of_an_upgrade_exist() -> None:
    for name in upgrade.TESTS:
        file, _, test = name.partition("::")
        assert test in (ROOT / "tests/kernels" / file).read_text()
