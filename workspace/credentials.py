# SPDX-License-Identifier: Apache-2.0
"""Find credentials in what becomes an image, and in an image: variables, files, layers, history.

Standard library only: this runs on the host, before there is an environment. What is found is
named by its place and kind; the value itself is in no finding, message or exception.

Not seen: what is encrypted or compressed (objects in a git repository, archives within a layer),
and binaries above a megabyte, which are compiled code and weights.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from workspace.errors import WorkspaceError


@dataclass(frozen=True)
class Finding:
    """A credential, by place and kind."""

    where: str
    kind: str
    path: str = ""
    """The file's absolute path; empty where it is no file."""
    scrubbed: bool = False
    """A tool makes it anew when it is missing, so it may be removed without asking."""

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}"


def listed(found: Iterable[Finding], most: int = 8) -> str:
    """Findings as part of one line."""
    lines = [str(finding) for finding in found]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return ", ".join(lines[:most] + more)


# --- what a credential looks like ----------------------------------------------------------------

# (kind, how it begins, how it goes on)
_SHAPES = [
    ("Hugging Face token", "hf_ api_org_", r"[A-Za-z0-9]{30,}(?!\w)"),
    ("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", r"[A-Za-z0-9]{36,}(?!\w)"),
    ("GitHub token", "github_pat_", r"[A-Za-z0-9]{22}_[A-Za-z0-9]{59}(?!\w)"),
    ("GitLab token", "glpat- gldt- glrt- glptt-", r"(?=[a-zA-Z_-]*\d)[\w-]{20,}"),
    ("npm token", "npm_", r"[A-Za-z0-9]{36}(?!\w)"),
    ("PyPI token", "pypi-", r"AgE[\w-]{50,}"),
    ("AWS access key", "AKIA ASIA", r"[A-Z2-7]{16}(?!\w)(?<!EXAMPLE)"),
    ("API key", "sk-", r"(?:proj|svcacct|admin|ant|or|lf)-(?=[A-Za-z_-]*\d)[\w-]{20,}"),
    ("API key", "sk-", r"(?=[A-Za-z]*\d)[A-Za-z0-9]{32,}(?![\w-])"),
    ("Slack token", "xoxa- xoxb- xoxc- xoxe- xoxp- xoxr- xoxs-", r"(?=[A-Za-z-]*\d)[\w-]{10,}"),
    ("Google API key", "AIza", r"[\w-]{35}(?![\w-])"),
    ("JSON web token", "eyJ", r"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ("NVIDIA API key", "nvapi-", r"[\w-]{40,}"),
    ("Docker Hub token", "dckr_pat_ dckr_oat_", r"[\w-]{20,}"),
    ("Weights & Biases key", "wandb_v1_", r"[\w-]{40,}"),
    ("Groq API key", "gsk_", r"[A-Za-z0-9]{52}(?!\w)"),
]
_PRIVATE_KEY = (
    r"(?P<private_key>-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:\s|\\[nr])*(?:[\w-]+: [^\n]*\n\s*)*[A-Za-z0-9+/=]{16})"
)
# In any file, only a password that nobody made up for an example.
_ADDRESS = r"(?P<address>://[^\s/:@\"'`<>]{1,64}:(?=[a-z_-]*[\dA-Z])(?=[\dA-Z_-]*[a-z])[\w-]{16,}@)"


def _any_shape() -> re.Pattern[bytes]:
    parts = [_PRIVATE_KEY, _ADDRESS]
    for number, (_, beginnings, rest) in enumerate(_SHAPES):
        heads = "|".join(beginnings.split())
        parts.append(rf"(?P<shape{number}>(?:(?<!\w)|(?<=\\[nrt]))(?:{heads}){rest})")
    return re.compile("|".join(parts).encode(), re.ASCII)


_SHAPE = _any_shape()
# Where a shape may be. It stops at a few rare characters only, so it is ten times as fast.
_HINT = re.compile(
    rb"[_\-IJ:](?:"
    rb"(?=[A-Za-z0-9]{22})(?<=_)"
    rb"|(?=[\w-]{10})(?:(?<=sk-|pi-|at-|dt-|rt-|tt-|at_|v1_)|(?<=xox\w-))"
    rb"|(?=----BEGIN [A-Z0-9 ]*PRIVATE)"
    rb"|(?=A[A-Z2-7]{16}|za[\w-]{35})|(?=[\w-]{10,}\.eyJ)(?<=eyJ)"
    rb"|(?=//[^\s/:@]{1,64}:[\w-]{16,}@))",
    re.ASCII,
)
_LONGEST_BEGINNING = 12
_ADDRESS_IN_SETTINGS = re.compile(
    # A reference to a variable is no value; a long user with digits and no password is a token.
    rb"[a-z]://(?:[^\s/:@\"']*:(?![$<{*])[^\s/@\"']+|(?=[^\s/:@]*\d)[\w-]{20,})@[\w\[]",
    re.ASCII,
)
_CONDA_TOKEN = re.compile(rb"://[^\s\"']*/t/(?!<)[\w-]{8,}/", re.ASCII)
_NAME = re.compile(
    r"\w*(?:SECRET|PASSWORD|PASSWD|PASSPHRASE)\w*|"
    r"(?:\w*_)?(?:PASS|PAT|CREDENTIALS?|AUTH|AUTH_?CONFIG)|\w*_PWD|"
    r"\w*_?AUTH_?TOKEN|\w*TOKEN(?:_\d+)?|"
    r"\w*(?:API|ACCESS|PRIVATE|MASTER|ENCRYPTION|SIGNING|DEPLOY|ACCOUNT)_?KEY(?:_ID|_DATA|_\d+)?|"
    r"CLIENT_KEY_DATA|SSH_KEY",
    re.IGNORECASE | re.ASCII,
)
_NAME_OF_SOMETHING_ELSE = re.compile(
    r"GOOGLE_APPLICATION_CREDENTIALS|"
    r".*_(?:FILE|PATH|DIR|FOLDER|NAME|PROVIDER|HELPER|SOCK|ENDPOINT|TYPE|TTL|EXPIRES?)",
    re.IGNORECASE,
)
_NO_VALUE = re.compile(
    r"[\"']?(?:|[$<{*].*|true|false|yes|no|on|off|none|null|\d{1,8}|x+|\.+)[\"']?",
    re.IGNORECASE | re.DOTALL,
)
_ASSIGNMENT = re.compile(
    # A line of a shell, TOML, INI, YAML, JSON, .npmrc or .netrc. Within a line of a command, `A= b`
    # gives A nothing.
    r"""(?:(^[ \t]*)|(?<=[\s"'.:/;|&(]))_?(?P<name>\w[\w-]*)["']?"""
    r"""(?:(?(1)[ \t]*[:=][ \t]*|(?:[ \t]*:[ \t]*|[ \t]+=[ \t]*|=))|(?<=password)[ \t]+)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s"',;]+)"""
    # An option of a command.
    r"""|(?<=\s)--?(?P<option>\w[\w-]*)(?:=|[ ]+)(?P<given>"[^"\n]*"|'[^'\n]*'|[^\s"'-][^\s"']*)""",
    re.MULTILINE | re.ASCII,
)
_AUTHORIZATION = re.compile(
    r"authorization[\"']?\s*[:=]\s*(?:bearer|basic|token)\s+[^\s$\"']{8,}", re.I
)


def _named(name: str, value: str) -> bool:
    """Whether a setting is a credential by its name."""
    name = re.sub(r"[.\-/]", "_", name)
    return bool(
        _NAME.fullmatch(name)
        and not _NAME_OF_SOMETHING_ELSE.fullmatch(name)
        and not _NO_VALUE.fullmatch(value.strip())
    )


def _shape(content: bytes) -> str | None:
    """The kind of credential that is somewhere in this content by its shape, or None."""
    for hint in _HINT.finditer(content):
        for start in range(max(0, hint.start() - _LONGEST_BEGINNING), hint.start() + 1):
            match = _SHAPE.match(content, start)
            if match and match.lastgroup:
                fixed = {"private_key": "private key", "address": "password in an address"}
                number = match.lastgroup.removeprefix("shape")
                return fixed.get(match.lastgroup) or _SHAPES[int(number)][0]
    return None


def _shape_in_settings(content: bytes) -> str | None:
    """`_shape`, and every password in an address: settings hold no examples."""
    if kind := _shape(content):
        return kind
    if _ADDRESS_IN_SETTINGS.search(content) or _CONDA_TOKEN.search(content):
        return "password in an address"
    return None


def _in_text(text: str) -> str | None:
    """The kind of credential in a command or a file of settings, or None."""
    if kind := _shape_in_settings(text.encode(errors="surrogateescape")):
        return kind
    if _AUTHORIZATION.search(text):
        return "credential"
    for match in _ASSIGNMENT.finditer(text):
        name = match["name"] or match["option"]
        if _named(name, (match["value"] or match["given"]).strip("\"'")):
            return "credential"
    return None


def in_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that are credentials by their name or by the shape of their value."""
    found = []
    for name, value in environment.items():
        kind = _shape_in_settings(value.encode(errors="surrogateescape"))
        if kind is None and _named(name, value):
            kind = "credential"
        if kind:
            found.append(Finding(f"variable {name}", kind))
    return found


# --- where credentials are kept ------------------------------------------------------------------

# Below any folder: of any user's home, of $HF_HOME, of the checkout.
_ALWAYS = [
    ("Hugging Face token", r"\.?huggingface/(?:token|stored_tokens)"),
    ("git's passwords", r"\.git-credentials|\.config/git/credentials|git/credential/.+"),
    ("passwords", r"[._]netrc|\.pgpass|\.mylogin\.cnf|\.password-store/.+|\.vault-token"),
    ("passwords", r"\.local/share/(?:keyrings|python_keyring|uv/credentials)/.+|\.authinfo"),
    ("SSH key", r"\.ssh/(?:id_[^/]*(?<!\.pub)|identity)"),
    ("GnuPG keys", r"\.gnupg/(?:private-keys-v1\.d/.+|secring\.gpg)"),
    ("AWS credentials", r"\.aws/(?:credentials|(?:sso|cli)/cache/.+)"),
    (
        "Google Cloud credentials",
        r"\.config/gcloud/(?:credentials\.db|access_tokens\.db|legacy_credentials/.+|"
        r"application_default_credentials\.json)",
    ),
    (
        "Azure credentials",
        r"\.azure/(?:accessTokens\.json|msal_token_cache\.\w+|service_principal\S+)",
    ),
    ("package registry token", r"\.cargo/credentials(?:\.toml)?|\.gem/credentials"),
    ("Kaggle token", r"\.?kaggle/kaggle\.json"),
    ("conda token", r"(?:anaconda-client|binstar)/(?:tokens/.+|[^/]+\.token)|\.anaconda/keyring"),
    (
        "token",
        r"\.vscode(?:-server|-remote|-cli)?(?:-insiders)?/(?:cli/)?(?:\.\w+\.token|token(?:\.json)?)",
    ),
    (
        "token",
        r"\.terraform\.d/credentials\.tfrc\.json|\.(?:claude/\.credentials|codex/auth)\.json",
    ),
]
_SCRUBBED = [
    ("shell history", r"\.(?:bash|zsh|ksh|sh|ash)_history|\.histfile|\.zhistory|\.history"),
    ("shell history", r"fish/fish_history|xonsh/history_json/.+|powershell/PSReadLine/.+"),
    ("history", r"\.(?:python|node_repl|sqlite|psql|mysql|rediscli|irb|gdb|lldb)_history"),
    ("history", r"\.(?:viminfo|ipython/profile_\w+/history\.sqlite)|\.local/state/nvim/shada/.+"),
    (
        "Jupyter's runtime file",
        r"jupyter/runtime/(?:jupyter_cookie_secret|[^/]+\.(?:json|html))|jupyter/notebook_secret",
    ),
]
# Files of settings, which hold credentials or don't.
_SETTINGS = re.compile(
    r".*/(?:pip\.conf|pip\.ini|\.pypirc|uv\.toml|\.npmrc|\.yarnrc(?:\.yml)?|\.bunfig\.toml|\.?condarc|"
    r"\.env(?:\.[\w.-]+)?|\.envrc|\.gitconfig|\.git/(?:config|FETCH_HEAD|packed-refs|logs/.+)|"
    r"git/config|gh/hosts\.yml|hub|glab-cli/config\.yml|\.kube/config|\.docker/config\.json|"
    r"containers/auth\.json|wandb/settings|\.?ngc/config|\.modal\.toml|rclone\.conf|\.s3cfg|\.boto|"
    r"\.my\.cnf|\.wgetrc|\.curlrc|jupyter_(?:\w+_)?config\.(?:json|py)|config\.fish|"
    r"\.(?:bash|zsh|ksh|csh|tcsh)(?:rc|_profile|_login|env)|\.profile|\.zprofile|\.pam_environment|"
    r"direct_url\.json)"
    r"|/etc/(?:environment|pip\.conf|profile|bash\.bashrc|gitconfig|npmrc|profile\.d/.+|"
    r"apt/(?:auth\.conf(?:\.d/.+)?|sources\.list(?:\.d/.+)?|apt\.conf(?:\.d/.+)?))"
)
_PASSWORD_HASH = re.compile(rb"^[^:\n]+:!?\$", re.MULTILINE)


def _places() -> tuple[re.Pattern[str], list[tuple[str, bool]]]:
    rules = [(kind, path, False) for kind, path in _ALWAYS]
    rules += [(kind, path, True) for kind, path in _SCRUBBED]
    parts = [f"(?P<place{number}>{path})" for number, (_, path, _) in enumerate(rules)]
    parts.append(f"(?P<place{len(rules)}>(?<=^/)(?:var/)?run/secrets/.+)")
    rules.append(("secret of a build or a service", "", False))
    return re.compile(f"(?:.*/)?(?:{'|'.join(parts)})"), [(kind, yes) for kind, _, yes in rules]


_PLACE, _PLACES = _places()


def _file(path: str, kind: str, *, scrubbed: bool = False) -> Finding:
    # A path may hold a value as well.
    shown = _SHAPE.sub(b"...", path.encode(errors="surrogateescape")).decode(errors="replace")
    return Finding(shown, kind, path, scrubbed)


def _at(path: str) -> Finding | None:
    """A finding for a file that its path alone tells."""
    match = _PLACE.fullmatch(path)
    if match is None:
        return None
    kind, scrubbed = _PLACES[int((match.lastgroup or "").removeprefix("place"))]
    return _file(path, kind, scrubbed=scrubbed)


def in_paths(paths: Iterable[str]) -> list[Finding]:
    """Files that are credentials by their absolute path, as `docker diff` tells them.

    Files of settings need their content: `in_tar` reads it.
    """
    return [finding for path in paths if (finding := _at(path))]


# --- what is in files ----------------------------------------------------------------------------

_CHUNK = 4 << 20
_OVERLAP = 8 << 10
_LARGE_BINARY = 1 << 20
_RECORD = re.compile(
    r"(.*/)(?:[^/]+\.dist-info/RECORD|conda-meta/[^/]+\.json)|(/)var/lib/dpkg/info/[^/]+\.md5sums"
)
"""What a package manager wrote about files it installed, and the folder they are named from."""
_MADE_FROM_SOURCE = re.compile(r".*/__pycache__/[^/]+\.pyc")
"""Python reads it only beside its source, and that is looked into."""


def _in_settings_file(path: str, content: bytes) -> str | None:
    text = content.decode(errors="surrogateescape")
    if path.endswith("direct_url.json"):
        return _shape_in_settings(content)
    return _in_text(text)


def _in_content(path: str, file: IO[bytes], size: int) -> tuple[str | None, bytes]:
    """The kind of credential in a file, or None; and its content, where it is one chunk."""
    content = first = file.read(_CHUNK)
    if size > _LARGE_BINARY and b"\0" in content[: 64 << 10]:
        return None, b""
    kind = None
    if path == "/etc/shadow" and _PASSWORD_HASH.search(content):
        kind = "password hash"
    elif _SETTINGS.fullmatch(path):
        kind = _in_settings_file(path, content)
    while content and kind is None:
        kind = _shape(content)
        more = file.read(_CHUNK)
        content = content[-_OVERLAP:] + more if more else b""
    return kind, first if size <= _CHUNK else b""


def _as_released(path: str, content: bytes, records: Mapping[str, list[bytes]]) -> bool:
    """Whether a package manager installed this very file: a sample of the package's maker."""
    sha256 = hashlib.sha256(content)
    urlsafe = base64.urlsafe_b64encode(sha256.digest()).rstrip(b"=").decode()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    for folder, lists in records.items():
        if not path.startswith(folder):
            continue
        record = b"".join(lists)
        name = path[len(folder) :]
        wheel, debian = f"\n{name},sha256={urlsafe},", f"\n{md5}  {name}\n"
        conda = f'"{name}"', f'"{sha256.hexdigest()}"'
        if wheel.encode() in record or debian.encode() in record:
            return True
        if all(part.encode() in record for part in conda):
            return True
    return False


def in_tar(stream: IO[bytes]) -> list[Finding]:
    """Credentials in a layer, or another tar stream: by path, and in the content of every file.

    Samples that a package brings along (a test's private key) are none where the package's own
    list (RECORD of a wheel, of conda, of Debian) has the file with this very hash.

    Raises:
        tarfile.TarError: this is no tar stream, or only a part of one.
    """
    found: list[Finding] = []
    samples: list[tuple[Finding, bytes]] = []
    records: dict[str, list[bytes]] = {}
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 20) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every one
            path = "/" + member.name.removeprefix("./").lstrip("/")
            linked = member.islnk()
            if not (linked or (member.isreg() and member.size)) or "/.wh." in path:
                continue
            if _MADE_FROM_SOURCE.fullmatch(path):
                continue
            if finding := _at(path):
                found.append(finding)
                continue
            file = None if linked else archive.extractfile(member)
            if file is None:
                continue
            if record := _RECORD.fullmatch(path):
                folder = record[1] or record[2]
                lines = file.read().replace(b"\r\n", b"\n")
                records.setdefault(folder, [b"\n"]).append(lines)
                continue
            kind, content = _in_content(path, file, member.size)
            if kind is None:
                continue
            finding = _file(path, kind)
            if content:
                samples.append((finding, content))
            else:
                found.append(finding)
        _expect_its_end(archive)
    found += [one for one, content in samples if not _as_released(one.path, content, records)]
    return found


def _expect_its_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end, and would leave the rest unread."""
    rest: Any = archive.fileobj
    while chunk := rest.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("damaged")


# --- an image ------------------------------------------------------------------------------------


def _in_document(document: Any, place: str, found: list[Finding]) -> None:
    """Every text in an image's configuration."""
    if isinstance(document, str):
        if kind := _in_text(document):
            found.append(Finding(place, kind))
    elif isinstance(document, list):
        for number, one in enumerate(document, 1):
            _in_document(
                one, f"step {number} of the history" if place == "history" else place, found
            )
        if all(isinstance(one, str) for one in document):
            _in_document(" ".join(document), place, found)
    elif isinstance(document, dict):
        for key, value in document.items():
            if key == "Env":
                pairs = (pair.partition("=") for pair in value or [])
                found += in_environment({name: value for name, _, value in pairs})
            elif key == "Labels":
                for finding in in_environment(value or {}):
                    found.append(
                        replace(finding, where=finding.where.replace("variable", "label", 1))
                    )
            else:
                named = key if place in ("", "config", "container_config") else place
                _in_document(value, named, found)


def in_configuration(configuration: Mapping[str, Any]) -> list[Finding]:
    """Credentials in an image's configuration: variables, labels, commands, history."""
    found: list[Finding] = []
    _in_document(configuration, "", found)
    return list(dict.fromkeys(found))


def in_saved(stream: IO[bytes], base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in what `docker save` writes, in its old layout or as an OCI archive.

    Args:
        stream: a tar of one image.
        base_layers: DiffIDs (`sha256:…`) of layers that were somebody else's to look at.

    Raises:
        WorkspaceError: the stream ends early, or a layer cannot be read.
    """
    documents: dict[str, Any] = {}
    layers: dict[str, list[Finding] | None] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]
                name = member.name.removeprefix("./")
                if member.issym() or member.islnk():
                    # The same layer twice: the old layout links ../<layer>/layer.tar.
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
                    layers[name] = _in_layer(file)
            _expect_its_end(archive)
        (manifest,) = documents["manifest.json"]
        configuration = documents[manifest["Config"]]
        diff_ids = configuration["rootfs"]["diff_ids"]
        names = manifest["Layers"]
        found = in_configuration(configuration)
        for number, (diff_id, name) in enumerate(zip(diff_ids, names, strict=True), 1):
            if diff_id in base_layers:
                continue
            place = f"layer {number} of {len(names)}"
            inside = layers[name]
            if inside is None:
                raise WorkspaceError(
                    f"{place} of the image is packed in a way that cannot be searched for "
                    "credentials (zstd, or damaged); build the image with gzip or plain layers"
                )
            found += [replace(one, where=f"{one.where} in {place}") for one in inside]
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise WorkspaceError(
            f"what docker save wrote is not a whole image ({type(error).__name__}); check the "
            "engine's disk space and run it again"
        ) from None
    return found


def _looks_like_json(file: Any) -> bool:
    start: bytes = file.peek(512)[:512]
    return start.startswith((b"{", b"[")) and start[257:262] != b"ustar"


def _in_layer(file: IO[bytes]) -> list[Finding] | None:
    """What is found in a layer; None where it cannot be read, which matters not for a base's."""
    try:
        return in_tar(file)
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        return None


def in_image(docker: str, image: str, base_layers: Collection[str] = ()) -> list[Finding]:
    """Credentials in an image of an engine: its configuration, history, and layers.

    Args:
        docker: Docker's client.
        image: name or id.
        base_layers: DiffIDs (`sha256:…`) of layers that are not looked into.

    Raises:
        WorkspaceError: the image could not be read to its end.
    """
    (told,) = json.loads(_output(docker, "image", "inspect", image))
    if folders := _folders_of_layers(told):
        # No tar in the image, or no right to read there: the long way finds the same.
        with contextlib.suppress(WorkspaceError):
            return _in_folders(docker, told, folders, base_layers)
    with _stream(docker, "save", image) as stream:
        return in_saved(stream, base_layers)


def _output(docker: str, *arguments: str) -> bytes:
    with _stream(docker, *arguments) as stream:
        return stream.read()


@contextlib.contextmanager
def _stream(docker: str, *arguments: str) -> Iterator[IO[bytes]]:
    """What a command of Docker's client writes.

    Raises:
        WorkspaceError: the command failed, or what it wrote could not be read.
    """
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            [docker, *arguments], stdout=subprocess.PIPE, stderr=complaints
        ) as process,
    ):
        assert process.stdout
        failed: Exception | None = None
        try:
            yield process.stdout
        except (WorkspaceError, tarfile.TarError) as error:
            failed = error
        process.stdout.close()
        # The command's own complaint says more; one that a signal ended has none: its reader left.
        if process.wait() > 0:
            complaints.seek(0)
            lines = complaints.read().decode(errors="replace").strip().splitlines()
            failed = WorkspaceError(lines[-1] if lines else f"docker {arguments[0]} failed")
        if failed or process.returncode:
            reason = failed or f"docker {arguments[0]} was ended"
            raise WorkspaceError(f"the image could not be searched for credentials: {reason}")


def _folders_of_layers(told: Mapping[str, Any]) -> list[str] | None:
    """Where the engine keeps each layer, the lowest first; None where it is not in folders.

    `docker save` of an image of 9 GB writes 9 GB to the engine's disk first (86 s on 2 cores), all
    for the last few MB.
    """
    driver = told.get("GraphDriver") or {}
    data = driver.get("Data") or {}
    if driver.get("Name") != "overlay2" or "UpperDir" not in data:
        return None
    lower = data["LowerDir"].split(":") if data.get("LowerDir") else []
    folders = [*reversed(lower), data["UpperDir"]]
    return folders if len(folders) == len(told["RootFS"]["Layers"]) else None


# Without its log: the engine would write all that tar writes to a file as well.
_TAR = ("run", "--rm", "--network=none", "--log-driver=none", "--user=0", "--entrypoint=tar")


def _in_folders(
    docker: str, told: Mapping[str, Any], folders: list[str], base_layers: Collection[str]
) -> list[Finding]:
    image = told["Id"]
    lines = _output(docker, "history", "--no-trunc", "--format", "{{json .}}", image).splitlines()
    steps = [json.loads(line) for line in reversed(lines)]
    history = [{"created_by": step["CreatedBy"], "comment": step["Comment"]} for step in steps]
    parts = {"config": "Config", "container_config": "ContainerConfig", "author": "Author"}
    configuration = {name: told.get(key) for name, key in parts.items()}
    found = in_configuration({**configuration, "history": history})
    for number, (diff_id, folder) in enumerate(
        zip(told["RootFS"]["Layers"], folders, strict=True), 1
    ):
        if diff_id in base_layers:
            continue
        mount = f"type=bind,source={folder},target=/layer,readonly"
        place = f"layer {number} of {len(folders)}"
        with _stream(docker, *_TAR, "--mount", mount, image, "-C", "/layer", "-c", ".") as stream:
            inside = in_tar(stream)
        found += [replace(one, where=f"{one.where} in {place}") for one in inside]
    return found
