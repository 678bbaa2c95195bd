# SPDX-License-Identifier: Apache-2.0
"""The container's description agrees with the pins and with itself; no engine is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from workspace.container import config, image
from workspace.environment import index
from workspace.host.errors import WorkspaceError
from workspace.pins.model import load
from workspace.pins.release import environment, pins

DOCKERFILE = image.DOCKERFILE.read_text()


def defaults() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))


def settings() -> dict[str, str]:
    """What the Dockerfile's last ENV sets."""
    (block,) = re.findall(r"^ENV HOME=(?:.*\\\n)*.*$", DOCKERFILE, re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", block))


def test_the_dockerfiles_defaults_are_the_pins() -> None:
    found = defaults()
    assert found["BASE_IMAGE"] == load().container.base
    assert found["MICROMAMBA_IMAGE"] == load().container.micromamba
    assert found["ENVIRONMENT"] == "conda"


def test_the_base_image_is_named_by_its_digest_and_of_the_pinned_cuda() -> None:
    base = load().container.base
    assert re.search(r"@sha256:[0-9a-f]{64}$", base)
    assert f":{load().release(load().vllm.default).cuda.toolkit}-devel-" in base


@pytest.mark.container  # the engine is asked for its machine
def test_every_argument_of_the_dockerfile_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENV", raising=False)
    wanted = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)) - {"UV"}
    assert set(image.arguments(load().vllm.default)) == wanted


def test_the_dockerfile_has_uv_where_the_workspace_looks_for_it() -> None:
    assert "/opt/vllm-kernels/.workspace/tools/uv-${UV_VERSION}/uv" in DOCKERFILE
    assert settings()["WORKSPACE_HOME"] == "/opt/vllm-kernels"


@pytest.mark.container
@pytest.mark.parametrize("mode", image.ENVIRONMENTS)
def test_the_image_has_its_environment_where_the_workspace_looks_for_it(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENV", mode)
    assert f"FROM tools AS environment-{mode}\nARG PREFIX\n" in DOCKERFILE
    for version in load().vllm.release:
        assert image.arguments(version)["PREFIX"] == environment(mode, version).name


def test_the_mounts_are_where_the_image_expects_them() -> None:
    found = config.load()
    assert found.folder == "/workspaces/vllm-kernels"
    assert f"WORKDIR {found.folder}" in DOCKERFILE
    assert settings()["WORKSPACE_HOME_FOR"] == found.folder
    places = set(found.volumes)
    assert places == {"/cache/downloads", "/cache/compiled", "/home/dev/.vscode-server"}
    for name, value in settings().items():
        if value.startswith("/cache/"):
            assert any(value.startswith(place + "/") for place in places), name


def test_a_checkout_that_cannot_be_mounted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "ROOT", tmp_path / "it's (1) ü")
    assert config.load().mounts[0].startswith(f"type=bind,source={tmp_path}/it's (1) ü,target=/")
    monkeypatch.setattr(config, "ROOT", tmp_path / "one, two")
    with pytest.raises(WorkspaceError, match="has a , in its path"):
        config.load()


def test_every_cache_of_a_tool_is_in_a_volume() -> None:
    held = {name for name, value in settings().items() if value.startswith("/cache/")}
    assert held >= {
        "UV_CACHE_DIR", "PIP_CACHE_DIR", "CCACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "VLLM_CACHE_ROOT", "WORKSPACE_CACHE", "HISTFILE",
    }  # fmt: skip


def test_the_container_is_not_privileged_and_has_shared_memory() -> None:
    text = config.FILE.read_text()
    assert "privileged" not in text
    assert "SYS_ADMIN" not in text
    assert any(re.fullmatch(r"--shm-size=\d+g", one) for one in config.load().run_arguments)


def test_tokens_are_declared_as_secrets_and_set_nowhere() -> None:
    text = config.FILE.read_text()
    document = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert "HF_TOKEN" in document["secrets"]
    assert {"containerEnv", "remoteEnv"}.isdisjoint(document)
    assert "HF_TOKEN" not in DOCKERFILE


def test_a_variable_that_only_vs_code_fills_in_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "devcontainer.json"
    changed.write_text(config.FILE.read_text().replace("${localEnv:USER}", "${devcontainerId}"))
    monkeypatch.setattr(config, "FILE", changed)
    with pytest.raises(WorkspaceError, match=r"\$\{devcontainerId\}, which make container"):
        config.load()


def test_a_description_that_is_no_json_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "devcontainer.json"
    broken.write_text("{")
    monkeypatch.setattr(config, "FILE", broken)
    with pytest.raises(WorkspaceError, match=r"devcontainer\.json cannot be read"):
        config.load()


def test_an_index_reaches_pip_and_uv_in_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*index.UV_VARIABLES, "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://somebody:word@index.invalid/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://more.invalid/simple file:///here/simple")
    found = index.container_settings()
    assert found["UV_DEFAULT_INDEX"] == found["PIP_INDEX_URL"]
    assert found["UV_INDEX"] == found["PIP_EXTRA_INDEX_URL"] == "https://more.invalid/simple"


def test_an_environment_that_no_image_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENV", "system")
    with pytest.raises(WorkspaceError, match="an image has ENV=conda or ENV=uv"):
        image.environment()


def test_vllms_own_image_is_a_base_by_its_short_name() -> None:
    version = load().vllm.default
    assert image.base_image("vllm", pins(), version) == f"vllm/vllm-openai:v{version}"
