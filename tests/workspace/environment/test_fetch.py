# SPDX-License-Identifier: Apache-2.0
"""Against a real index: an HTTP server on loopback that can misbehave."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.workspace.conftest import NOBODY
from workspace.environment import fetch
from workspace.host.errors import WorkspaceError
from workspace.pins.model import Artifact

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = Artifact(project="thing", filename="thing-1.0.tar.gz", sha256=SHA256)


class Index(http.server.BaseHTTPRequestHandler):
    """The simple index of one project with one file."""

    misbehave = ""
    requests: list[str]
    login = ""
    """What it asks for as user and password."""
    logins: list[str]
    """What it was told."""
    files = ""
    """Scheme and host of its links to files."""

    def do_GET(self) -> None:
        type(self).requests.append(self.path)
        told = self.headers.get("Authorization", "").removeprefix("Basic ")
        type(self).logins.append(base64.b64decode(told).decode())
        if self.logins[-1] != self.login and self.login:
            self.send_error(401)
        elif self.misbehave == "no index":
            self._answer(b"%PDF-1.4", "application/pdf")
        elif self.path == "/simple/thing/":
            name = "other-1.0.tar.gz" if self.misbehave == "absent" else FILE.filename
            link = f'<a href="{self.files}/files/{name}">{name}</a>'
            self._answer(link.encode(), "text/html")
        elif self.path.startswith("/files/"):
            if self.misbehave == "truncated":
                self._answer(CONTENT[:5000], "application/octet-stream", length=len(CONTENT))
            elif self.misbehave == "corrupted":
                self._answer(b"x" + CONTENT[1:], "application/octet-stream")
            elif self.misbehave == "forbidden":
                self.send_error(403)
            else:
                self._answer(CONTENT, "application/octet-stream")
        else:
            self.send_error(404)

    def _answer(self, body: bytes, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""


@contextlib.contextmanager
def serve() -> Iterator[tuple[type[Index], str]]:
    """An index on loopback, and its scheme and host."""
    empty: dict[str, Any] = {"requests": [], "logins": []}
    handler = type("Handler", (Index,), empty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    with serve() as (handler, place):
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"{place}/simple/")
        monkeypatch.setenv("WORKSPACE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield handler


@pytest.fixture
def own_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The index of a network with a certificate of its own, and that certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("WORKSPACE_CACHE", str(tmp_path / "cache"))
    handler = type("Handler", (Index,), {"requests": [], "logins": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"https://127.0.0.1:{server.server_port}/simple/")
    yield certificate
    server.shutdown()
    thread.join()
    server.server_close()


def left_over(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_comes_from_the_users_index_and_then_from_the_cache(index: type[Index]) -> None:
    path = fetch.fetch(FILE)
    assert path.read_bytes() == CONTENT
    asked = len(index.requests)
    assert fetch.fetch(FILE) == path
    assert len(index.requests) == asked


def test_a_damaged_file_in_the_cache_is_fetched_anew(index: type[Index]) -> None:
    path = fetch.fetch(FILE)
    path.write_bytes(CONTENT[:100])
    assert fetch.fetch(FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("setting", ["PIP_CERT", "SSL_CERT_FILE"])
def test_the_certificate_that_pip_or_uv_was_given_serves_for_downloads_too(
    own_certificate: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with pytest.raises(WorkspaceError, match="SSLError"):
        fetch.fetch(FILE)
    monkeypatch.setenv(setting, str(own_certificate))
    assert fetch.fetch(FILE).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("truncated", "could not be fetched|damaged"),
        ("corrupted", "damaged or the index serves another file"),
        ("absent", "has thing, but no thing-1.0.tar.gz"),
        ("forbidden", "answered 403"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(
    index: type[Index], tmp_path: Path, fault: str, says: str
) -> None:
    index.misbehave = fault
    with pytest.raises(WorkspaceError, match=says) as error:
        fetch.fetch(FILE)
    assert "\n" not in str(error.value)
    assert left_over(tmp_path) == []
    index.misbehave = ""
    assert fetch.fetch(FILE).read_bytes() == CONTENT


def test_a_project_that_the_index_lacks_is_named(index: type[Index]) -> None:
    with pytest.raises(WorkspaceError, match="no project nothing"):
        fetch.fetch(FILE.model_copy(update={"project": "nothing"}))


def test_without_a_network_the_error_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{NOBODY}/simple/")
    monkeypatch.setenv("WORKSPACE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WorkspaceError, match="check the network") as error:
        fetch.fetch(FILE)
    target = tmp_path / "cache" / SHA256[:16] / FILE.filename
    assert str(target) in str(error.value)
    target.write_bytes(CONTENT)
    assert fetch.fetch(FILE) == target


def test_what_a_killed_download_left_is_cleared(index: type[Index], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / SHA256[:16]
    folder.mkdir(parents=True)
    (folder / "partial-abc").write_bytes(b"half")
    fetch.fetch(FILE)
    assert [path.name for path in folder.iterdir()] == [FILE.filename]


USER, PASSWORD = "reader", "pa/s%s@w=rd:ü"


@pytest.fixture
def closed_index(
    index: type[Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> type[Index]:
    """An index that asks for a password and links to its files by whole addresses."""
    index.login = f"{USER}:{PASSWORD}"
    index.files = os.environ["UV_DEFAULT_INDEX"].removesuffix("/simple/")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return index


def with_login(address: str, login: str) -> str:
    return address.replace("://", f"://{login}@")


@pytest.mark.parametrize("way", ["address", "named", "netrc", "user and netrc"])
def test_the_indexs_password_is_used_for_its_page_and_its_files(
    closed_index: type[Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    address = os.environ["UV_DEFAULT_INDEX"]
    if way == "address":
        address = with_login(address, f"{USER}:{quote(PASSWORD, safe='')}")
    elif way == "named":
        address = f"our-own={address}"
        monkeypatch.setenv("UV_INDEX_OUR_OWN_USERNAME", USER)
        monkeypatch.setenv("UV_INDEX_OUR_OWN_PASSWORD", PASSWORD)
    else:
        text = f"machine 127.0.0.1 login {USER} password {PASSWORD}\n"
        (tmp_path / "netrc").write_text(text, encoding="utf-8")
    if way == "user and netrc":
        address = with_login(address, USER)
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    assert fetch.fetch(FILE).read_bytes() == CONTENT
    assert closed_index.logins == [closed_index.login] * 2


def test_another_host_is_not_told_the_indexs_password(
    closed_index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = with_login(os.environ["UV_DEFAULT_INDEX"], f"{USER}:{quote(PASSWORD, safe='')}")
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    with serve() as (files, place):
        closed_index.files = place
        assert fetch.fetch(FILE).read_bytes() == CONTENT
        assert files.logins == [""]


@pytest.mark.parametrize(
    ("fault", "login", "says"),
    [
        ("no index", f"{USER}:{quote(PASSWORD, safe='')}", "is not one"),
        ("absent", f"{USER}:{quote(PASSWORD, safe='')}", "no thing-1.0.tar.gz"),
        ("", f"{USER}:wrong-one", "answered 401"),
        ("", f"{USER}:wrong/one", "is not valid; .* written as %2F"),
        ("", f"{USER}:wrong[one", "is not valid"),
    ],
)
def test_no_message_shows_the_indexs_password(
    closed_index: type[Index],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    login: str,
    says: str,
) -> None:
    closed_index.misbehave = fault
    monkeypatch.setenv("UV_DEFAULT_INDEX", with_login(os.environ["UV_DEFAULT_INDEX"], login))
    with pytest.raises(WorkspaceError, match=says) as error:
        fetch.fetch(FILE)
    message = str(error.value)
    told = (USER, PASSWORD, quote(PASSWORD, safe=""), login.partition(":")[2])
    assert not [secret for secret in told if secret in message]
