# SPDX-License-Identifier: Apache-2.0
"""Pinned files of the package index, in a cache that all checkouts share.

A file gets its final name in the cache after its sha256 was checked, and is checked again whenever
it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import requests
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    DistributionPackage,
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


def listing(project: str) -> list[DistributionPackage]:
    """Every file of a project whose sha256 is in the package index.

    Raises:
        WorkspaceError: no network, or the index does not have the project.
    """
    with _one_line_errors(project, f"the list of {project}'s files"), _client() as client:
        page = client.get_project_page(project, timeout=60)
    return [package for package in page.packages if "sha256" in package.digests]


class _Credentials(AuthBase):
    """User and password of the index for files on its host; for another host those in its URL or in
    .netrc, like pip."""

    def __init__(self) -> None:
        self.known = index.credentials()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        assert request.url
        origin = index.origin(request.url)
        of_index = self.known.get(origin) if origin else None
        user, password = of_index or get_auth_from_url(request.url)
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
    # requests prefers REQUESTS_CA_BUNDLE; it does not read the settings of pip and uv.
    session.verify = index.certificate() or True
    return PyPISimple(index.address() or PYPI_SIMPLE_ENDPOINT, session=session)


def _download(artifact: Artifact, target: Path) -> None:
    with _client() as client:
        page = client.get_project_page(artifact.project, timeout=60)
        package = next((p for p in page.packages if p.filename == artifact.filename), None)
        if package is None:
            raise WorkspaceError(
                f"the package index has {artifact.project}, but no {artifact.filename}; point "
                "UV_DEFAULT_INDEX (or pip's index-url) to one that has it"
            )
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
def _one_line_errors(project: str, what: str, alternative: str = "") -> Iterator[None]:
    """Turn errors into one line: what could not be fetched, and what to do."""
    try:
        yield
        return
    except NoSuchProjectError:
        reason = f"the package index has no project {project}"
    except requests.HTTPError as error:
        reason = f"the package index answered {error.response.status_code} for {what}"
    except requests.RequestException as error:
        reason = f"{what} could not be fetched ({type(error).__name__})"
    except (
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
        UnparsableFilenameError,
        ValueError,
    ) as error:
        reason = f"the URL set as package index is not one ({index.redact(str(error))})"
    raise WorkspaceError(
        f"{reason}; check the network, point UV_DEFAULT_INDEX (or pip's index-url) to another "
        f"index{alternative}"
    )


def fetch(artifact: Artifact) -> Path:
    """The path of the file in the cache, after a download if needed.

    Raises:
        WorkspaceError: no network, not in the index, or not the pinned sha256.
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
        by_hand = f", or copy the file yourself to {target}"
        with _one_line_errors(artifact.project, artifact.filename, by_hand):
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
