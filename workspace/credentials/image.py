# SPDX-License-Identifier: Apache-2.0
"""Find credentials in an image: its configuration, its history and its layers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import IO, Any

from workspace.credentials.content import Finding, kind_in_text, search_environment
from workspace.credentials.files import expect_end, search_tar
from workspace.host.errors import WorkspaceError


def search_configuration(configuration: Mapping[str, Any]) -> list[Finding]:
    """Credentials in an image's configuration: variables, labels, commands, history."""
    return list(dict.fromkeys(_in_document(configuration, "")))


def _in_document(document: Any, where: str) -> Iterator[Finding]:
    """Credentials in a JSON document; `where` names the part of the configuration it is."""
    if isinstance(document, str):
        if kind := kind_in_text(document):
            yield Finding(where, kind)
    elif isinstance(document, list):
        for number, item in enumerate(document, 1):
            step = f"step {number} of the history" if where == "history" else where
            yield from _in_document(item, step)
        if all(isinstance(item, str) for item in document):
            yield from _in_document(" ".join(document), where)
    elif isinstance(document, dict):
        for key, value in document.items():
            if key == "Env":
                pairs = (pair.partition("=") for pair in value or [])
                yield from search_environment({name: value for name, _, value in pairs})
            elif key == "Labels":
                for finding in search_environment(value or {}):
                    label = finding.where.replace("variable", "label", 1)
                    yield replace(finding, where=label)
            else:
                part = key if where in ("", "config", "container_config") else where
                yield from _in_document(value, part)


def _in_layer(found: list[Finding], number: int, count: int) -> list[Finding]:
    return [
        replace(finding, where=f"{finding.where} in layer {number} of {count}") for finding in found
    ]


def search_saved_image(stream: IO[bytes], base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in the output of `docker save`, in its old layout or as an OCI archive.

    Args:
        stream: a tar of one image.
        base_layers: DiffIDs (`sha256:…`) of layers to skip.

    Raises:
        WorkspaceError: the stream ends early, or a layer cannot be read.
    """
    documents: dict[str, Any] = {}
    layers: dict[str, list[Finding] | None] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
            for member in archive:
                archive.members = []  # pyrefly: ignore[missing-attribute]
                name = member.name.removeprefix("./")
                if member.issym() or member.islnk():
                    # A layer that occurs twice: the old layout links ../<layer>/layer.tar.
                    layers.setdefault(name, [])
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or name.rpartition("/")[2] in ("VERSION", "repositories"):
                    continue
                if name.replace("blobs/sha256/", "sha256:") in base_layers:
                    continue
                if name.endswith(".json") or _looks_like_json(file):
                    documents[name] = json.loads(file.read())
                elif name.endswith("/layer.tar") or name.startswith("blobs/"):
                    layers[name] = _search_layer(file)
            expect_end(archive)
        (manifest,) = documents["manifest.json"]
        configuration = documents[manifest["Config"]]
        diff_ids = configuration["rootfs"]["diff_ids"]
        names = manifest["Layers"]
        found = search_configuration(configuration)
        for number, (diff_id, name) in enumerate(zip(diff_ids, names, strict=True), 1):
            if diff_id in base_layers:
                continue
            inside = layers[name]
            if inside is None:
                raise WorkspaceError(
                    f"layer {number} of {len(names)} of the image cannot be searched for "
                    "credentials (zstd, or damaged); build the image with gzip or plain layers"
                )
            found += _in_layer(inside, number, len(names))
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise WorkspaceError(
            f"the output of docker save is not a whole image ({type(error).__name__}); check the "
            "engine's disk space and re-run"
        ) from None
    return found


def _looks_like_json(file: Any) -> bool:
    start: bytes = file.peek(512)[:512]
    return start.startswith((b"{", b"[")) and start[257:262] != b"ustar"


def _search_layer(file: IO[bytes]) -> list[Finding] | None:
    """Findings in a layer; None if it cannot be read, an error only for a layer not of the base."""
    try:
        return search_tar(file)
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        return None


def search_image(docker: str, image: str, base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in an image of a Docker engine: its configuration, history and layers.

    Args:
        docker: path of Docker's client.
        image: name or id.
        base_layers: DiffIDs (`sha256:…`) of layers to skip.

    Raises:
        WorkspaceError: the image could not be read completely.
    """
    (inspected,) = json.loads(_output(docker, "image", "inspect", image))
    if folders := _layer_folders(inspected):
        # If the image has no tar, or the folders cannot be read, docker save does the same.
        with contextlib.suppress(WorkspaceError):
            return _search_layer_folders(docker, inspected, folders, base_layers)
    with _stream(docker, "save", image) as stream:
        return search_saved_image(stream, base_layers)


def _output(docker: str, *arguments: str) -> bytes:
    with _stream(docker, *arguments) as stream:
        return stream.read()


@contextlib.contextmanager
def _stream(docker: str, *arguments: str) -> Iterator[IO[bytes]]:
    """The output of a docker command.

    Raises:
        WorkspaceError: the command failed, or its output could not be read.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen([docker, *arguments], stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout
        failed: Exception | None = None
        try:
            yield process.stdout
        except (WorkspaceError, tarfile.TarError) as error:
            failed = error
        process.stdout.close()
        # The command's own message says more; ended by our closing of stdout it has none.
        if process.wait() > 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            failed = WorkspaceError(lines[-1] if lines else f"docker {arguments[0]} failed")
        if failed or process.returncode:
            reason = failed or f"docker {arguments[0]} was killed"
            raise WorkspaceError(f"the image could not be searched for credentials: {reason}")


def _layer_folders(inspected: Mapping[str, Any]) -> list[str] | None:
    """The engine's folder of each layer, lowest first; None if layers are not kept in folders.

    Faster than `docker save`, which writes an image of 9 GB to the engine's disk (86 s on 2 cores)
    to get at the last few MB.
    """
    driver = inspected.get("GraphDriver") or {}
    data = driver.get("Data") or {}
    if driver.get("Name") != "overlay2" or "UpperDir" not in data:
        return None
    lower = data["LowerDir"].split(":") if data.get("LowerDir") else []
    folders = [*reversed(lower), data["UpperDir"]]
    return folders if len(folders) == len(inspected["RootFS"]["Layers"]) else None


# Without a log: the engine would copy the whole output of tar into it.
_TAR = ("run", "--rm", "--network=none", "--log-driver=none", "--user=0", "--entrypoint=tar")


def _search_layer_folders(
    docker: str, inspected: Mapping[str, Any], folders: list[str], base_layers: Collection[str]
) -> list[Finding]:
    image = inspected["Id"]
    lines = _output(docker, "history", "--no-trunc", "--format", "{{json .}}", image).splitlines()
    steps = [json.loads(line) for line in reversed(lines)]
    history = [{"created_by": step["CreatedBy"], "comment": step["Comment"]} for step in steps]
    parts = {"config": "Config", "container_config": "ContainerConfig", "author": "Author"}
    configuration = {name: inspected.get(key) for name, key in parts.items()}
    found = search_configuration({**configuration, "history": history})
    for number, (diff_id, folder) in enumerate(
        zip(inspected["RootFS"]["Layers"], folders, strict=True), 1
    ):
        if diff_id in base_layers:
            continue
        mount = f"type=bind,source={folder},target=/layer,readonly"
        with _stream(docker, *_TAR, "--mount", mount, image, "-C", "/layer", "-c", ".") as stream:
            found += _in_layer(search_tar(stream), number, len(folders))
    return found
