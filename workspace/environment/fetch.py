# SPDX-License-Identifier: Apache-2.0
"""Pinned files of the package index, kept in a cache that all checkouts share.

A file enters the cache only after its sha256 was checked, so a file under its final name is whole.
It is checked again whenever it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedContentTypeError,
)
from pypi_simple.errors import UnparsableFilenameError, UnsupportedRepoVersionError
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from requests.utils import get_auth_from_url, get_netrc_auth
from urllib3.util import Retry

from workspace.environment import index
from workspace.environment.progress import bytes_progress
from workspace.host.errors import WorkspaceError
from workspace.host.paths import cache_folder
from workspace.pins.model import Artifact


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Listed:
    """A file of a project, as the package index lists it."""

    filename: str
    version: str | None
    sha256: str


def listing(project: str) -> list[Listed]:
    """Every file of a project whose sha256 the package index names.

    Raises:
        WorkspaceError: no network, or the index does not have the project.
    """
    with _clear_errors(project, f"the list of {project}'s files"), _client() as client:
        page = client.get_project_page(project, timeout=60)
    return [
        Listed(package.filename, package.version, package.digests["sha256"])
        for package in page.packages
        if "sha256" in package.digests
    ]


class _Credentials(AuthBase):
    """The index's user and password for files on its own host; for another host those in its URL or
    in .netrc, as pip does it."""

    def __init__(self) -> None:
        self.known = index.credentials()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        assert request.url
        origin = index.origin(request.url)
        own = self.known.get(origin) if origin else None
        user, password = own or get_auth_from_url(request.url)
        netrc = None if password else get_netrc_auth(request.url)
        if netrc and user in ("", netrc[0]):
            user, password = netrc
        if not (user or password):
            return request
        return HTTPBasicAuth(user.encode(), password.encode())(request)


def _client() -> PyPISimple:
    session = requests.Session()
    session.auth = _Credentials()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=Retry(total=3, backoff_factor=0.3)))
    # requests takes REQUESTS_CA_BUNDLE before this; of pip's and uv's settings it knows nothing.
    session.verify = index.certificate() or True
    return PyPISimple(index.address() or PYPI_SIMPLE_ENDPOINT, session=session)


def _download(artifact: Artifact, target: Path) -> None:
    with _client() as client:
        page = client.get_project_page(artifact.project, timeout=60)
        try:
            package = next(p for p in page.packages if p.filename == artifact.filename)
        except StopIteration:
            raise WorkspaceError(
                f"the package index has {artifact.project}, but no {artifact.filename}; point "
                "UV_DEFAULT_INDEX (or pip's index-url) to one that has it"
            ) from None
        with (
            client.s.get(package.url, stream=True, timeout=60) as response,
            bytes_progress() as bar,
        ):
            response.raise_for_status()
            total = int(response.headers.get("content-length") or 0) or None
            task = bar.add_task(f"fetching {artifact.filename}", total=total)
            with target.open("wb") as file:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
                    bar.advance(task, len(chunk))


@contextlib.contextmanager
def _clear_errors(project: str, what: str, alternative: str = "") -> Iterator[None]:
    """Turn errors into one line: what could not be fetched, and what to do."""
    try:
        yield
    except NoSuchProjectError:
        raise WorkspaceError(
            f"the package index has no project {project}; point UV_DEFAULT_INDEX (or pip's "
            f"index-url) to one that has it{alternative}"
        ) from None
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise WorkspaceError(
            f"the package index answered {status} for {what}; try again later, "
            f"point UV_DEFAULT_INDEX (or pip's index-url) to another{alternative}"
        ) from None
    except requests.RequestException as error:
        raise WorkspaceError(
            f"{what} could not be fetched ({type(error).__name__}); check the "
            f"network, point UV_DEFAULT_INDEX (or pip's index-url) to a mirror{alternative}"
        ) from None
    except (
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
        UnparsableFilenameError,
        ValueError,
    ) as error:
        raise WorkspaceError(
            f"the URL set as package index does not answer as one ({index.hide(str(error))}); "
            "check UV_DEFAULT_INDEX or pip's index-url"
        ) from None


def fetch(artifact: Artifact) -> Path:
    """The file's path in the cache, downloaded if need be.

    Raises:
        WorkspaceError: no network, not in the index, or a sha256 that is not the pinned one.
    """
    folder = cache_folder(artifact.sha256)
    target = folder / artifact.filename
    if target.exists():
        if sha256(target) == artifact.sha256:
            return target
        target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("partial-*"):
        stale.unlink()
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="partial-")
    os.close(descriptor)
    partial = Path(name)
    try:
        by_hand = f", or put the file there yourself: {target}"
        with _clear_errors(artifact.project, artifact.filename, by_hand):
            _download(artifact, partial)
        found = sha256(partial)
        if found != artifact.sha256:
            raise WorkspaceError(
                f"{artifact.filename} from the package index has sha256 {found[:16]}…, pinned is "
                f"{artifact.sha256[:16]}…; the download was damaged or the index serves another "
                "file: re-run, then check the index"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
