# SPDX-License-Identifier: Apache-2.0
"""The package index that the user configured for pip or uv.

uv does not read pip's configuration and our own downloads read neither, so a machine behind a
mirror would need its address three times. It is read here once: uv's variables first, then
pip's variables, then pip's configuration files in pip's own order.

Standard library only: this runs before the environment exists.
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
HIDDEN = "****"
Origin = tuple[str, str, int | None]


def _pip_config_files() -> list[Path]:
    """Pip's configuration files, lowest priority first."""
    if os.environ.get("PIP_CONFIG_FILE") == os.devnull:
        return []
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    system = os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
    files = [Path(folder) / "pip" / "pip.conf" for folder in system]
    files += [SYSTEM_CONFIG, home / ".pip" / "pip.conf", config / "pip" / "pip.conf"]
    if os.environ.get("PIP_CONFIG_FILE"):
        files.append(Path(os.environ["PIP_CONFIG_FILE"]))
    return files


def _pip_setting(name: str) -> str:
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value is not None:
        return value
    for path in reversed(_pip_config_files()):
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
    found = re.match(r"([\w.-]+)=", text)
    return (found[1], text[found.end() :]) if found else ("", text)


def _main_index() -> tuple[str, str]:
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(variable):
            return _named(os.environ[variable])
    return "", _pip_setting("index-url").strip()


def index_url() -> str | None:
    """The index to ask as the user wrote it, which may be with a password, or None where the user
    set none (the tools' own default)."""
    return _main_index()[1] or None


def _parts(url: str) -> SplitResult | None:
    """The parts of an address, None where it is none: mostly a password that is not encoded."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def address() -> str | None:
    """The index to ask, without user and password."""
    require_readable()
    parts = urlsplit(index_url() or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) or None


def require_readable() -> None:
    """Raise where what is set as an index is no address: a tool would show it with its password."""
    if any(_parts(url) is None for _, url in _all_indexes()):
        raise WorkspaceError(
            "the address set as package index cannot be read; check UV_DEFAULT_INDEX or pip's "
            "index-url: characters such as / # ? @ in a password are written as %2F %23 %3F %40"
        )


def origin(url: str) -> Origin | None:
    """Scheme, host and port: what a password is for."""
    parts = _parts(url)
    if parts is None:
        return None
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname or "", port


def credentials() -> dict[Origin, tuple[str, str]]:
    """Origin of an index → user and password (empty where it has none), from its address or from
    the variables that uv reads for an index with a name."""
    found = {}
    for name, url in _all_indexes():
        parts, place = _parts(url), origin(url)
        if parts is None or place is None:
            continue
        variable = "UV_INDEX_" + re.sub(r"\W", "_", name).upper()
        user = unquote(parts.username or "") or os.environ.get(f"{variable}_USERNAME", "")
        password = unquote(parts.password or "") or os.environ.get(f"{variable}_PASSWORD", "")
        if user or password:
            found[place] = (user, password)
    return found


def _all_indexes() -> list[tuple[str, str]]:
    further = [*os.environ.get("UV_INDEX", "").split(), *_extra_indexes()]
    return [_main_index(), *map(_named, further)]


def hide(text: str) -> str:
    """A message of a tool without the users and passwords of the indexes that it asked."""
    secrets = [password for _, password in credentials().values()]
    for _, url in _all_indexes():
        # Not by the rules of addresses: a password with a / in it is none to them.
        userinfo = url.partition("://")[2].rpartition("@")[0]
        text = text.replace(f"{userinfo}@", f"{HIDDEN}@") if userinfo else text
        secrets.append(userinfo.partition(":")[2])
    for secret in filter(lambda one: len(one) > 3, secrets):
        text = text.replace(secret, HIDDEN)
    return text


def certificate() -> str | None:
    """The CA certificates that the user gave uv or pip, for a network with its own."""
    return os.environ.get("SSL_CERT_FILE") or _pip_setting("cert").strip() or None


def _extra_indexes() -> list[str]:
    """pip's further indexes. Local folders among them are pip's own format; uv refuses some, and no
    container has them."""
    return [e for e in _pip_setting("extra-index-url").split() if e.startswith("http")]


def container_settings() -> dict[str, str]:
    """Variables that make pip and uv in a container ask what they ask here; folders of this
    machine are not there, so they are left out."""
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
        WorkspaceError: what is set as an index is no address.
    """
    require_readable()
    if any(os.environ.get(variable) for variable in UV_VARIABLES):
        return {}
    settings: dict[str, str] = {}
    url = index_url()
    if url:
        settings["UV_DEFAULT_INDEX"] = url
    if extra := _extra_indexes():
        settings["UV_INDEX"] = " ".join(extra)
        # pip takes the best version of all indexes. Every file is checked against the lock's
        # hashes, so the wrong index cannot slip another file in.
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if found := certificate():
        settings["SSL_CERT_FILE"] = found
    return settings
