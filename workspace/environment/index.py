# SPDX-License-Identifier: Apache-2.0
"""The package index that the user configured for pip or uv.

uv does not read pip's configuration and requests reads neither, so a machine behind a mirror would
need its address three times. It is read here once: first uv's variables, then pip's variables, then
pip's configuration files in pip's order.
"""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from workspace.host.errors import WorkspaceError

SYSTEM_CONFIG = Path("/etc/pip.conf")
UV_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_CONFIG_FILE")
Origin = tuple[str, str, int | None]


def _pip_setting(name: str) -> str:
    """A setting of pip, by variable or configuration file; empty if it is not set."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value is not None:
        return value
    extra = os.environ.get("PIP_CONFIG_FILE")
    if extra == os.devnull:
        return ""
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    system = os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
    files = [*(Path(folder) / "pip" / "pip.conf" for folder in system), SYSTEM_CONFIG]
    files += [home / ".pip" / "pip.conf", config / "pip" / "pip.conf"]
    files += [Path(extra)] if extra else []
    for path in reversed(files):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        for section in ("install", "global"):
            if parser.has_option(section, name):
                return parser.get(section, name)
    return ""


def _named(text: str) -> tuple[str, str]:
    """Name and address of an index: uv allows `name=address`, and an address may have a `=`."""
    match = re.match(r"([\w.-]+)=", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _main_index() -> tuple[str, str]:
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(variable):
            return _named(os.environ[variable])
    return "", _pip_setting("index-url").strip()


def _extra_indexes() -> list[str]:
    """pip's extra indexes without local folders, some of which uv refuses and no container has."""
    return [url for url in _pip_setting("extra-index-url").split() if url.startswith("http")]


def _all_indexes() -> list[tuple[str, str]]:
    extra = [*os.environ.get("UV_INDEX", "").split(), *_extra_indexes()]
    return [_main_index(), *map(_named, extra)]


def index_url() -> str | None:
    """The main index as the user wrote it, possibly with a password; None for the default."""
    return _main_index()[1] or None


def _split(url: str) -> SplitResult | None:
    """The parts of an address; None if it is not valid, usually for a password with special
    characters."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def address() -> str | None:
    """The main index without user and password."""
    require_valid()
    parts = urlsplit(index_url() or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) or None


def require_valid() -> None:
    """Raise if the address of an index is not valid: a tool would print it with its password."""
    if any(_split(url) is None for _, url in _all_indexes()):
        raise WorkspaceError(
            "the address set as package index is not valid; check UV_DEFAULT_INDEX or pip's "
            "index-url: characters such as / # ? @ in a password are written as %2F %23 %3F %40"
        )


def origin(url: str) -> Origin | None:
    """Scheme, host and port, for which a password is valid."""
    parts = _split(url)
    if parts is None:
        return None
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port


def credentials() -> dict[Origin, tuple[str, str]]:
    """Origin of an index → user and password (or empty), from its address or from the variables
    that uv reads for a named index."""
    logins = {}
    for name, url in _all_indexes():
        parts, key = _split(url), origin(url)
        if parts is None or key is None:
            continue
        variable = "UV_INDEX_" + re.sub(r"\W", "_", name).upper()
        user = unquote(parts.username or "") or os.environ.get(f"{variable}_USERNAME", "")
        password = unquote(parts.password or "") or os.environ.get(f"{variable}_PASSWORD", "")
        if user or password:
            logins[key] = (user, password)
    return logins


def redact(text: str) -> str:
    """The message of a tool without users and passwords of the indexes."""
    secrets = [password for _, password in credentials().values()]
    for _, url in _all_indexes():
        # Not with urlsplit: the password may contain a /.
        userinfo = url.partition("://")[2].rpartition("@")[0]
        text = text.replace(f"{userinfo}@", "****@") if userinfo else text
        secrets.append(userinfo.partition(":")[2])
    for secret in secrets:
        text = text.replace(secret, "****") if len(secret) > 3 else text
    return text


def certificate() -> str | None:
    """The file of CA certificates that the user set for uv or pip."""
    return os.environ.get("SSL_CERT_FILE") or _pip_setting("cert").strip() or None


def container_settings() -> dict[str, str]:
    """Variables that make pip and uv in a container use the same indexes, without local folders."""
    settings = uv_environment()
    for name in UV_VARIABLES[:3]:
        if os.environ.get(name):
            settings[name] = os.environ[name]
    extra = " ".join(_extra_indexes())
    for name, value in (("PIP_INDEX_URL", index_url()), ("PIP_EXTRA_INDEX_URL", extra)):
        if value:
            settings[name] = value
    settings.pop("SSL_CERT_FILE", None)
    return settings


def uv_environment() -> dict[str, str]:
    """Variables that make uv use pip's index, for a user who configured pip only.

    Raises:
        WorkspaceError: the address of an index is not valid.
    """
    require_valid()
    if any(os.environ.get(variable) for variable in UV_VARIABLES):
        return {}
    settings: dict[str, str] = {}
    if url := index_url():
        settings["UV_DEFAULT_INDEX"] = url
    if extra := _extra_indexes():
        settings["UV_INDEX"] = " ".join(extra)
        # Like pip, the best version of all indexes. Every file is checked against the hashes of the
        # lock, so another index cannot provide another file.
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if path := certificate():
        settings["SSL_CERT_FILE"] = path
    return settings
