# SPDX-License-Identifier: Apache-2.0
"""Find credentials in text, in the bytes of a file, and in environment variables.

A finding names place and kind; the value itself is in no finding, message or exception.

Not found: anything encrypted or compressed (objects in a git repository, archives inside a layer).
Nor a password that is a word, or a word followed by a number, unless the file is one of the user's
settings.
"""

from __future__ import annotations

import base64
import contextlib
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from workspace.credentials import formats


@dataclass(frozen=True)
class Finding:
    """A credential: where it is and of what kind."""

    where: str
    kind: str
    path: str = ""
    """The file's absolute path; empty if it is not a file."""
    scrubbed: bool = False
    """The file is recreated by its tool when missing, so it may be removed without asking."""

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}"


def listed(found: Iterable[Finding], most: int = 8) -> str:
    """The first `most` findings in one line, and how many more there are."""
    lines = [str(finding) for finding in found]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return ", ".join(lines[:most] + more)


def _is_placeholder(value: str) -> bool:
    """Whether a value is a placeholder that the reader is to replace."""
    return bool(formats.PLACEHOLDER.search(value)) or len(set(value)) < min(8, len(value) // 2)


def _looks_random(value: str, least: int) -> bool:
    """Whether a value looks generated: not a word, reference, path or version."""
    return (
        len(value) >= least
        and not (value.isalpha() or formats.REFERENCE.fullmatch(value) or _is_placeholder(value))
        and bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))
        and not formats.WORDS_AND_NUMBERS.fullmatch(value)
    )


def is_credential(name: str, value: str) -> bool:
    """Whether a setting is a credential, judged by its name, and has a value."""
    name = re.sub(r"[.\-/]", "_", name)
    return bool(
        formats.CREDENTIAL_NAME.fullmatch(name)
        and not formats.NOT_A_CREDENTIAL_NAME.fullmatch(name)
        and not formats.NO_VALUE.fullmatch(value.strip())
        and not formats.PLACEHOLDER.search(value)
    )


def _assignments(text: str, *, quoted: bool = False) -> Iterator[tuple[str, str]]:
    """Names and values in a command or a settings file; with `quoted`, in source code."""
    for match in formats.ASSIGNMENT.finditer(text.replace('\\"', '"')):
        value = match["value"] or match["given"] or match["entry"]
        if not quoted or value[0] in "\"'":
            yield match["name"] or match["option"] or match["key"], value.strip("\"'")


def assigns_credential(text: str, least: int, *, quoted: bool = False) -> bool:
    """Whether a text assigns a credential: by its name, with a generated-looking value of at least
    `least` characters."""
    for line in text.splitlines():
        lower = line.lower()
        if not any(hint in lower for hint in formats.HINTS):
            continue
        for pattern in (formats.AUTHORIZATION, formats.LOGIN):
            values = (match[match.lastindex or 0] for match in pattern.finditer(line))
            if any(_looks_random(value, least) for value in values):
                return True
        for name, value in _assignments(line, quoted=quoted):
            if is_credential(name, value) and _looks_random(value, least):
                return True
    return False


_LETTERS = (string.ascii_letters + string.digits).encode()
_RUN_CHARACTERS, _WORD_CHARACTERS = (
    bytes(ord("a") if code in _LETTERS + signs else ord(" ") for code in range(256))
    for signs in (b"_-~%+", b"_-~%+./=:|!&?@#$*^")
)
_RUN = b"a" * 20
# Letters and digits; or a prefix of tokens that may have no digit.
_MIXED = re.compile(
    rb"[\W\d_]*(?:[A-Za-z][^\d]*\d|\d[\W\d_]*[A-Za-z])|"
    rb"n?(?:hf_|gh[opsur]_|gl[a-z]+-|npm_|sk-|A(?:KIA|SIA|BIA|CCA|Iza)|GOCSPX-)",
    re.ASCII,
)
_BEFORE, _AFTER = 200, 4096


def _candidates(content: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of every word with 20 letters and digits in a row, and both among them.

    Two translations and `find` skip most of a text ten times as fast as a regular expression with
    that many alternatives.
    """
    runs, words = content.translate(_RUN_CHARACTERS), content.translate(_WORD_CHARACTERS)
    at = runs.find(_RUN)
    while at >= 0:
        end = runs.find(b" ", at)
        end = len(content) if end < 0 else end
        if _MIXED.match(content, at, end):
            first, last = max(0, at - _BEFORE), min(len(content), end + _AFTER)
            start = words.rfind(b" ", first, at) + 1 or first
            end = words.find(b" ", end, last)
            end = last if end < 0 else end
            yield start, end
        at = runs.find(_RUN, end)


_BASE64 = re.compile(rb"[A-Za-z0-9+/]{200}")


def _within_base64(content: bytes, match: re.Match[bytes]) -> bool:
    """Whether a match is part of an encoded image or file: between `/` and `+`, a few in a
    thousand stretches of 100 kB of base64 have the format of a short token."""
    return match[0][:1] in (b"/", b"+") and any(
        _BASE64.fullmatch(content, begin, begin + 200)
        for begin in (match.start(1) - 200, match.end(1))
        if begin >= 0
    )


def _token_kind(value: bytes) -> str:
    return next(
        kind for kind, shape in formats.TOKENS if re.fullmatch(shape.encode(), value, re.ASCII)
    )


def _match_at(content: bytes, mark: bytes, pattern: re.Pattern[bytes], before: int) -> bool:
    """Whether `pattern` matches `before` bytes before a `mark`; a password in it must look
    generated."""
    at = content.find(mark)
    while at >= 0:
        if match := pattern.match(content, at - before):
            password = match.groupdict(b"").get("password")
            if password is None or _looks_random(password.decode(errors="replace"), 8):
                return True
        at = content.find(mark, at + 1)
    return False


def _has_registry_login(content: bytes) -> bool:
    """Whether it has user and password for a registry, as Docker, podman and helm store them."""
    for match in formats.REGISTRY_LOGIN.finditer(content, content.find(b"auths")):
        with contextlib.suppress(ValueError):
            if re.fullmatch(rb"[\x21-\x7e]+:[\x21-\x7e]+", base64.b64decode(match[1])):
                return True
    return False


def kind_in_bytes(content: bytes, *, quoted: bool = False) -> str | None:
    """The kind of the first credential in a file of any format, or None.

    Args:
        quoted: source code, where only string literals are values.
    """
    content = b"\n" + content
    if _match_at(content, b"-----BEGIN ", formats.PRIVATE_KEY, 0):
        return "private key"
    if _match_at(content, b"://", formats.URL_WITH_PASSWORD, 1):
        return "password in an address"
    if _match_at(content, b"Key=", formats.AZURE_ACCOUNT_KEY, 0):
        return "Azure account key"
    if b"auths" in content and _has_registry_login(content):
        return "registry login"
    for start, end in _candidates(content):
        for match in formats.TOKEN.finditer(content, start - 1, end):
            if not (_is_placeholder(match[1].decode()) or _within_base64(content, match)):
                return _token_kind(match[1])
        if quoted and content[start - 1 : start] not in (b'"', b"'"):
            continue
        if formats.WORDS_AND_NUMBERS.fullmatch(content[start:end].decode(errors="replace")):
            continue
        around = content[max(0, start - 80) : end + 2].decode(errors="replace")
        if assigns_credential(around, 16, quoted=quoted):
            return "credential"
    return None


def kind_in_settings(content: bytes) -> str | None:
    """As `kind_in_bytes`, but any password in a URL counts: settings hold no examples."""
    if kind := kind_in_bytes(content):
        return kind
    if formats.URL_WITH_PASSWORD.search(content) or formats.CONDA_TOKEN.search(content):
        return "password in an address"
    return None


def kind_in_text(text: str) -> str | None:
    """The kind of the first credential in a command or a settings file, or None."""
    if kind := kind_in_settings(text.encode(errors="surrogateescape")):
        return kind
    named = any(is_credential(name, value) for name, value in _assignments(text))
    if named or formats.AUTHORIZATION.search(text) or assigns_credential(text, 6):
        return "credential"
    return None


def search_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that are credentials by their name or by the format of their value."""
    found = []
    for name, value in environment.items():
        kind = kind_in_text(value)
        if kind is None and is_credential(name, value):
            kind = "credential"
        if kind:
            found.append(Finding(f"variable {name}", kind))
    return found
