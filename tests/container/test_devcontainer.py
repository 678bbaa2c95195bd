# SPDX-License-Identifier: Apache-2.0
"""What VS Code does, through the devcontainer CLI, and the same without it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.conftest import (
    BASE,
    CROSS_SECTION,
    NAME,
    SUITE,
    Host,
    Ran,
    docker,
    inside,
    new_host,
    remove,
    second_engine,
    up,
)
from tests.workspace.conftest import SMALL_BENCH
from workspace.container.docker import client

pytestmark = [pytest.mark.container, pytest.mark.slow]


def created(host: Host) -> dict[str, Any]:
    label = f"label=devcontainer.local_folder={host.root}"
    (one,) = docker("ps", "--no-trunc", "--quiet", "--filter", label).split()
    return json.loads(docker("container", "inspect", one))[0]


def test_opening_it_sets_everything_up_as_the_checkouts_owner(
    host: Host, container: Ran, devcontainer: list[str]
) -> None:
    assert '"outcome":"success"' in container.output
    assert "· ready" in container.output
    who = inside(host, devcontainer, "bash", "-c", "id -u; id -un; make doctor")
    assert who.status == 0, who.output
    assert f"{host.root.stat().st_uid}\ndev\n" in who.output
    assert "\nready" in who.output


def test_the_host_gets_files_of_its_own_user(
    host: Host, container: Ran, devcontainer: list[str]
) -> None:
    assert inside(host, devcontainer, "touch", "made-inside").status == 0
    made = host.root / "made-inside"
    assert made.stat().st_uid == host.root.stat().st_uid
    made.unlink()


def test_make_bench_runs_vllm_in_it(host: Host, container: Ran, devcontainer: list[str]) -> None:
    ran = inside(host, devcontainer, "make", "bench", *SMALL_BENCH)
    assert ran.status == 0, ran.output
    (path,) = (host.root / "benchmarks" / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert record["valid"] is True


def test_make_test_passes_in_it(host: Host, container: Ran, devcontainer: list[str]) -> None:
    ran = inside(host, devcontainer, "env", f"PYTEST_ADDOPTS={CROSS_SECTION}", "make", "test")
    assert ran.status == 0, ran.output
    assert " passed" in ran.output


def test_make_container_and_shell_use_the_container_that_is_there(
    host: Host, container: Ran
) -> None:
    before = created(host)["Id"]
    started = host.make("container")
    assert started.status == 0, started.output
    assert created(host)["Id"] == before
    ran = host.make("shell", "CMD=exit 7")
    assert ran.status == 2  # make's own, for a recipe that failed
    ran = host.make("shell", "CMD=pwd; echo token $HF_TOKEN", HF_TOKEN="only-for-this-command")
    assert "/workspaces/vllm-kernels" in ran.output
    assert "token only-for-this-command" in ran.output
    assert "only-for-this-command" not in json.dumps(created(host))


def test_a_secret_reaches_the_commands_and_not_the_containers_settings(
    host: Host, container: Ran, devcontainer: list[str]
) -> None:
    secrets = host.root.parent / "secrets.json"
    secrets.write_text(json.dumps({"HF_TOKEN": "hf_" + "x" * 34}))
    ran = host.run(
        *devcontainer, "run-user-commands", "--docker-path", host.env["DOCKER"],
        "--workspace-folder", str(host.root), "--secrets-file", str(secrets),
    )  # fmt: skip
    assert ran.status == 0, ran.output
    assert "hf_xxxx" not in json.dumps(created(host))


def test_a_stopped_container_is_started_again(host: Host, container: Ran) -> None:
    found = created(host)["Id"]
    docker("stop", "--time", "1", found)
    refused = host.make("shell", "CMD=true")
    assert "this checkout's container is stopped; run: make container" in refused.output
    assert host.make("container").status == 0
    assert created(host)["Id"] == found


def test_an_older_container_is_not_replaced_without_a_word(host: Host, container: Ran) -> None:
    found = created(host)["Id"]
    refused = host.make("container", f"IMAGE={BASE}:{SUITE}")
    assert refused.status != 0
    assert "make container FORCE=1 makes a new one" in refused.output
    assert created(host)["Id"] == found


def test_a_set_up_that_ends_with_its_container_is_said_to_be_killed(small: Host) -> None:
    description = small.root / ".devcontainer" / "devcontainer.json"
    text = description.read_text()
    description.write_text(text.replace('"make dev"', '"echo begun; sleep 3600"'))
    process = small.start("make", "container")
    assert process.stdout
    assert any(line == "begun\n" for line in process.stdout)
    docker("kill", created(small)["Id"])
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "it was killed: the container or the engine was stopped" in output
    description.write_text(text.replace('"make dev"', '"echo begun"'))
    again = small.make("container")
    assert again.status == 0, again.output


@pytest.fixture
def nvidia_engine(base_image: str) -> Iterator[str]:
    """A second engine in which NVIDIA's runtime is installed, on this machine without a GPU.

    The runtime is a script that fails as NVIDIA's does without a driver.
    """
    with tempfile.TemporaryDirectory(prefix="nvidia-") as folder:
        Path(folder).chmod(0o755)
        runtime = Path(folder) / "nvidia-container-runtime"
        runtime.write_text(
            "#!/bin/sh\necho 'nvidia-container-cli: initialization error: nvml error: driver not "
            "loaded' >&2\nexit 1\n"
        )
        runtime.chmod(0o755)
        with second_engine(base_image, f"--add-runtime=nvidia={runtime}") as address:
            yield address


def test_with_nvidias_runtime_and_no_gpu_it_opens_all_the_same(
    base_image: str, devcontainer: list[str], nvidia_engine: str
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    address = nvidia_engine
    name = f"{NAME}-nvidia"
    host = new_host(base_image, name)
    try:
        # What is inside does not matter here, so the image is the base with the right fingerprint.
        description = host.root / ".devcontainer" / "devcontainer.json"
        text = description.read_text().replace('"make dev"', '"true"')
        description.write_text(text)
        label = host.run(
            "python3", "-c",
            "import os; from workspace.pins import release; from workspace.container import image; "
            "version, base = release.selected(), os.environ.get('BASE_IMAGE'); context = "
            "image.lay_out_context(version); build = image.arguments(version, base); "
            "print(image.fingerprint(context, build))",
        ).output.strip()  # fmt: skip
        subprocess.run(
            [client(), "--host", address, "build", "-q", "-t", f"{name}:dev", "-"],
            input=f"FROM {base_image}\nLABEL vllm-kernels.fingerprint={label}\n", text=True,
            check=True, env={**os.environ, "DOCKER_BUILDKIT": "0"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        opened = up(host, devcontainer, DOCKER_HOST=address)
        assert "NVIDIA's runtime is installed, but there is no GPU" in opened.output
        assert '"outcome":"success"' in opened.output
        found = subprocess.run(
            [client(), "--host", address, "ps", "--quiet"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        assert len(found) == 1
    finally:
        remove(host, name)
