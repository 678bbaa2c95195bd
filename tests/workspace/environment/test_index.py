# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from workspace.environment import index


@pytest.fixture(autouse=True)
def _nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*index.UV_VARIABLES, "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setattr(index, "SYSTEM_CONFIG", tmp_path / "etc-pip.conf")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "xdg"))


def test_without_settings_the_tools_keep_their_default() -> None:
    assert index.index_url() is None
    assert index.uv_environment() == {}


def test_uv_is_given_the_index_that_pip_has(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = http://127.0.0.1:1/simple\n"
        "extra-index-url = http://127.0.0.1:2/simple file:///local\ncert = /some/ca.pem\n"
    )
    assert index.uv_environment() == {
        "UV_DEFAULT_INDEX": "http://127.0.0.1:1/simple",
        "UV_INDEX": "http://127.0.0.1:2/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/some/ca.pem",
    }


def test_pips_variable_wins_over_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://127.0.0.1:1/simple\n")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert index.index_url() == "http://127.0.0.1:9/simple"


def test_uvs_own_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=http://127.0.0.1:8/simple")
    assert index.uv_environment() == {}
    assert index.index_url() == "http://127.0.0.1:8/simple"


def test_a_broken_configuration_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("not = an [ini file\n[global\n")
    assert index.index_url() is None


def test_what_a_tool_says_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:un/encoded@127.0.0.1:8/simple")
    monkeypatch.setenv("UV_INDEX", "more=http://token-of-mine@127.0.0.1:9/simple?a=b")
    monkeypatch.setenv("UV_INDEX_MORE_PASSWORD", "elsewhere")
    for secret in ("me:un/encoded", "un/encoded", "token-of-mine", "elsewhere"):
        shown = index.redact(f"error: http://{secret}@127.0.0.1:8/simple does not answer")
        assert secret not in shown
        assert "127.0.0.1:8/simple does not answer" in shown


def test_an_address_may_hold_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://me:a=b@127.0.0.1:8/simple?c=d")
    assert index.address() == "http://127.0.0.1:8/simple?c=d"
    assert index.credentials() == {("http", "127.0.0.1", 8): ("me", "a=b")}
