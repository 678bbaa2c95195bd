# SPDX-License-Identifier: Apache-2.0
"""Find credentials in files: by their path, and in the contents of a tar archive.

Binaries above a megabyte are skipped: they are compiled code and weights.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

from workspace.credentials.content import (
    Finding,
    assigns_credential,
    kind_in_bytes,
    kind_in_settings,
    kind_in_text,
)
from workspace.credentials.formats import TOKEN

KNOWN = [
    ("Hugging Face token", r"\.?huggingface/(?:token|stored_tokens)"),
    ("git's passwords", r"\.git-credentials|\.config/git/credentials|git/credential/.+"),
    ("passwords", r"[._]netrc|\.pgpass|\.mylogin\.cnf|\.password-store/.+|\.vault-token"),
    ("passwords", r"\.local/share/(?:keyrings|python_keyring|uv/credentials)/.+|\.authinfo"),
    ("SSH key", r"\.ssh/(?:id_[^/]*(?<!\.pub)|identity)|[^/]+\.ppk"),
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
"""(kind, path) below any folder: a user's home, $HF_HOME, the checkout."""
SCRUBBED = [
    ("shell history", r"\.(?:bash|zsh|ksh|sh|ash)_history|\.histfile|\.zhistory|\.history"),
    ("shell history", r"fish/fish_history|xonsh/history_json/.+|powershell/PSReadLine/.+"),
    ("history", r"\.(?:python|node_repl|sqlite|psql|mysql|rediscli|irb|gdb|lldb)_history"),
    ("history", r"\.(?:viminfo|ipython/profile_\w+/history\.sqlite)|\.local/state/nvim/shada/.+"),
    (
        "Jupyter's runtime file",
        r"jupyter/runtime/(?:jupyter_cookie_secret|[^/]+\.(?:json|html))|jupyter/notebook_secret",
    ),
    ("Ray's token", r"\.ray/auth_token"),
]
"""As KNOWN, but recreated by their tools, so they may be removed without asking."""
SETTINGS = re.compile(
    r".*/(?:pip\.conf|pip\.ini|\.pypirc|uv\.toml|\.npmrc|\.yarnrc(?:\.yml)?|\.bunfig\.toml|\.?condarc|"
    r"\.env(?:\.[\w.-]+)?|\.envrc|\.gitconfig|\.git/(?:config|FETCH_HEAD|packed-refs|logs/.+)|"
    r"git/config|gh/hosts\.yml|hub|glab-cli/config\.yml|\.kube/config|\.docker/config\.json|"
    r"containers/auth\.json|wandb/settings|\.?ngc/config|\.modal\.toml|rclone\.conf|\.s3cfg|\.boto|"
    r"\.my\.cnf|\.wgetrc|\.curlrc|jupyter_(?:\w+_)?config\.(?:json|py)|config\.fish|"
    r"\.(?:bash|zsh|ksh|csh|tcsh)(?:rc|_profile|_login|env)|\.profile|\.zprofile|\.pam_environment|"
    r"direct_url\.json|[^/]+\.tfvars(?:\.json)?|[^/]+\.tfstate(?:\.backup)?|\.dockercfg|\.vault_pass|"
    r"\.terraformrc|gradle\.properties|\.m2/settings(?:-security)?\.xml|[Nn]u[Gg]et\.[Cc]onfig)"
    r"|/etc/(?:environment|pip\.conf|profile|bash\.bashrc|gitconfig|npmrc|profile\.d/.+|"
    r"apt/(?:auth\.conf(?:\.d/.+)?|sources\.list(?:\.d/.+)?|apt\.conf(?:\.d/.+)?))"
)
"""Settings that may hold a credential."""
SETTINGS_FORMATS = re.compile(
    r".*\.(?:tf|hcl|ya?ml|toml|ini|cfg|cnf|conf|config|properties|env|xml|json[5cl]?|plist|service|"
    r"php|sh|ps1|log)|.*/(?:Dockerfile[^/]*|[^./]+)"
)
"""Formats of other settings files, scripts and logs."""
SOURCE_CODE = re.compile(
    r".*\.(?:py|pyi|pyx|pxd|ipynb|c|cc|cpp|cxx|cu|cuh|h|hh|hpp|inl|[cm]?js|[jt]sx?|go|rs|java|rb|lua)"
)
"""Here a value is a string literal; anything unquoted is an expression."""
PASSWORD_HASH = re.compile(rb"^[^:\n]+:!?\$", re.MULTILINE)


def _known_paths() -> tuple[re.Pattern[str], list[tuple[str, bool]]]:
    rules = [(kind, path, False) for kind, path in KNOWN]
    rules += [(kind, path, True) for kind, path in SCRUBBED]
    rules.append(("secret of a build or a service", "(?<=^/)(?:var/)?run/secrets/.+", False))
    parts = [f"(?P<rule{number}>{path})" for number, (_, path, _) in enumerate(rules)]
    return re.compile(f"(?:.*/)?(?:{'|'.join(parts)})"), [
        (kind, scrubbed) for kind, _, scrubbed in rules
    ]


_KNOWN_PATH, _KNOWN_KINDS = _known_paths()


def _finding(path: str, kind: str, *, scrubbed: bool = False) -> Finding:
    # The path itself may contain a token.
    shown = TOKEN.sub(rb"/...", path.encode(errors="surrogateescape")).decode(errors="replace")
    return Finding(shown, kind, path, scrubbed)


def _by_path(path: str) -> Finding | None:
    """The finding for a file that is a credential by its path alone, else None."""
    match = _KNOWN_PATH.fullmatch(path)
    if match is None:
        return None
    kind, scrubbed = _KNOWN_KINDS[int((match.lastgroup or "").removeprefix("rule"))]
    return _finding(path, kind, scrubbed=scrubbed)


def search_paths(paths: Iterable[str]) -> list[Finding]:
    """Files that are credentials by their absolute path, as `docker diff` prints it.

    Settings files are judged by their content instead, see `search_tar`.
    """
    return [finding for path in paths if (finding := _by_path(path))]


CHUNK = 4 << 20
_OVERLAP = 8 << 10
_LARGE_BINARY = 1 << 20
INSTALLED_FILES = re.compile(
    r"(.*/)(?:[^/]+\.dist-info/RECORD|conda-meta/[^/]+\.json)"
    r"|(/)(?:var/lib/dpkg/info|opt/vllm-kernels/snapshot)/[^/]+\.md5sums"
)
"""A list of files as they were released, by a package manager or of the fork in a snapshot; its
group is the folder they are relative to."""
BYTECODE = re.compile(r".*/__pycache__/[^/]+\.pyc")
"""Python uses it only next to its source, which is searched."""


def _kind_in_file(path: str, file: IO[bytes], size: int) -> tuple[str | None, bytes]:
    """The kind of credential in a file, or None; and its content if it is one chunk, else empty."""
    content = first = file.read(CHUNK)
    if size > _LARGE_BINARY and b"\0" in content[: 64 << 10]:
        return None, b""
    kind = None
    if path == "/etc/shadow" and PASSWORD_HASH.search(content):
        kind = "password hash"
    elif SETTINGS.fullmatch(path):
        if path.endswith("direct_url.json"):
            kind = kind_in_settings(content)
        else:
            kind = kind_in_text(content.decode(errors="surrogateescape"))
    quoted = SOURCE_CODE.fullmatch(path) is not None
    settings = not quoted and b"\0" not in content and SETTINGS_FORMATS.fullmatch(path) is not None
    while content and kind is None:
        kind = kind_in_bytes(content, quoted=quoted)
        if settings and kind is None and assigns_credential(content.decode(errors="replace"), 6):
            kind = "credential"
        more = file.read(CHUNK)
        content = content[-_OVERLAP:] + more if more else b""
    return kind, first if size <= CHUNK else b""


def _as_released(path: str, content: bytes, records: Mapping[str, list[bytes]]) -> bool:
    """Whether the file was released with this content: a sample of its author's."""
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


def search_tar(stream: IO[bytes]) -> list[Finding]:
    """Credentials in a tar stream, such as a layer: by path, and in the content of every file.

    A package's sample (a test's private key) does not count if a list of released files (of a
    wheel, conda, Debian, or the fork in a snapshot) has it with the same hash.

    Raises:
        tarfile.TarError: not a tar stream, or cut off.
    """
    found: list[Finding] = []
    samples: list[tuple[Finding, bytes]] = []
    records: dict[str, list[bytes]] = {}
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=1 << 20) as archive:
        for member in archive:
            archive.members = []  # pyrefly: ignore[missing-attribute]  # or it keeps every member
            path = "/" + member.name.removeprefix("./").lstrip("/")
            linked = member.islnk()
            if not (linked or (member.isreg() and member.size)) or "/.wh." in path:
                continue
            if BYTECODE.fullmatch(path):
                continue
            if finding := _by_path(path):
                found.append(finding)
                continue
            file = None if linked else archive.extractfile(member)
            if file is None:
                continue
            if record := INSTALLED_FILES.fullmatch(path):
                folder = record[1] or record[2]
                lines = file.read().replace(b"\r\n", b"\n")
                records.setdefault(folder, [b"\n"]).append(lines)
                continue
            kind, content = _kind_in_file(path, file, member.size)
            if kind is None:
                continue
            finding = _finding(path, kind)
            if content:
                samples.append((finding, content))
            else:
                found.append(finding)
        expect_end(archive)
    found += [
        finding for finding, content in samples if not _as_released(finding.path, content, records)
    ]
    return found


def expect_end(archive: tarfile.TarFile) -> None:
    """Raise if anything follows: tarfile takes a damaged header for the end of the archive."""
    rest: Any = archive.fileobj
    while chunk := rest.read(CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("damaged")
