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
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/pip.conf")
UV_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_CONFIG_FILE")


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


def index_url() -> str | None:
    """The index to ask, or None where the user set none (the tools' own default)."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(variable):
            # uv allows name=address.
            return os.environ[variable].split("=", 1)[-1]
    return _pip_setting("index-url").strip() or None


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
    """Variables that make uv use pip's index, for a user who configured pip only."""
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
