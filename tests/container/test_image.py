# SPDX-License-Identifier: Apache-2.0
"""`make image` on a real engine."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.container.conftest import (
    NAME,
    PASSWORD,
    USER,
    Host,
    Ran,
    docker,
    give_to,
    new_host,
    remove,
    second_engine,
)
from workspace.container.docker import architecture, client
from workspace.host.paths import lock_path
from workspace.pins.model import load

pytestmark = [pytest.mark.container, pytest.mark.slow]
IMAGE = f"{NAME}:dev"


def inspected(name: str = IMAGE) -> dict[str, Any]:
    return json.loads(docker("image", "inspect", name))[0]


def test_labels_name_the_commit_the_lock_and_the_pins(host: Host, image: Ran) -> None:
    labels = inspected()["Config"]["Labels"]
    commit = host.run("git", "rev-parse", "HEAD").output.strip()
    release = load().release(load().vllm.default)
    assert labels["org.opencontainers.image.revision"] == commit
    lock = lock_path(load().vllm.default).read_bytes()
    assert labels["vllm-kernels.lock"] == hashlib.sha256(lock).hexdigest()
    pins = json.loads(labels["vllm-kernels.pins"])
    assert pins["vllm"] == load().vllm.default
    assert (pins["torch"], pins["cuda"]) == (release.torch, release.cuda.toolkit)


def test_the_user_is_the_checkouts_owner_and_not_root(host: Host, image: Ran) -> None:
    found = docker("run", "--rm", IMAGE, "id")
    assert f"uid={host.root.stat().st_uid}(dev)" in found
    assert "(workspace)" in found


def test_it_is_made_for_the_engines_machine(host: Host, image: Ran) -> None:
    assert architecture() == docker("run", "--rm", IMAGE, "uname", "-m")


def test_the_second_time_nothing_is_built_and_no_registry_asked(host: Host, image: Ran) -> None:
    again = host.make("image", HTTPS_PROXY="http://127.0.0.1:1")
    assert again.status == 0, again.output
    assert "building" not in again.output


def test_a_change_in_our_own_code_leaves_the_environments_layers(host: Host, image: Ran) -> None:
    before = inspected()["RootFS"]["Layers"]
    names = ("workspace/bootstrap.py", "kernels/custom_kernels/compile/build.py")
    changes = {host.root / name: "# changed\n" for name in names}
    changes[host.root / ".devcontainer" / "Dockerfile"] = 'LABEL changed="yes"\n'
    texts = {path: path.read_text() for path in changes}
    for path, line in changes.items():
        path.write_text(texts[path] + line)
    again = host.make("image")
    for path, text in texts.items():
        path.write_text(text)
    assert again.status == 0, again.output
    assert "building" in again.output
    after = inspected()
    assert after["Config"]["Labels"]["changed"] == "yes"
    assert after["RootFS"]["Layers"][: len(before) - 2] == before[:-2]
    assert host.make("image").status == 0
    kept = docker("images", "--all", "--quiet", "--no-trunc").split()
    assert after["Id"] not in kept  # it lost its name, and nothing runs it


def test_the_indexs_password_that_the_build_used_is_in_no_layer(host: Host, image: Ran) -> None:
    assert PASSWORD in (host.root / ".workspace" / "container" / "index.env").read_text()
    assert PASSWORD not in image.output
    assert PASSWORD not in docker("history", "--no-trunc", IMAGE) + json.dumps(inspected())
    # The environment's own files apart, which are the packages'.
    search = f"grep -rls {PASSWORD} / --exclude-dir=proc --exclude-dir=sys --exclude-dir=.venv"
    assert docker("run", "--rm", "--user", "0", IMAGE, "sh", "-c", f"{search} || true") == ""


@pytest.fixture
def another(base_image: str) -> Iterator[Host]:
    """A user whose image is not built yet."""
    name = f"{NAME}-another"
    made = new_host(base_image, name)
    yield made
    remove(made, name)


def test_a_base_that_cannot_be_pulled_is_one_clear_error(another: Host) -> None:
    ran = another.make("image", BASE_IMAGE="127.0.0.1:1/nothing:here")
    assert ran.status != 0
    assert "could not be pulled" in ran.output
    assert "BASE_IMAGE=" in ran.output
    assert docker("images", "--quiet", f"{NAME}-another") == ""


def test_a_full_disk_is_one_clear_error_and_nothing_is_tagged(
    another: Host, base_image: str
) -> None:
    dockerfile = another.root / ".devcontainer" / "Dockerfile"
    first = "RUN --mount=type=cache,target=/var/cache/apt"
    fill = "RUN dd if=/dev/zero of=/fill bs=1M count=500"
    dockerfile.write_text(dockerfile.read_text().replace(first, f"{fill}\n{first}", 1))
    with second_engine(base_image, megabytes=450) as address:
        ran = another.make("image", "NETWORK=host", DOCKER_HOST=address)
        assert ran.status != 0
        assert "Docker has no disk space left; docker system df shows" in ran.lines[-2]
        left = docker("--host", address, "images", "--format", "{{.Repository}}")
        assert left == base_image.partition(":")[0]


def test_without_an_engine_it_says_how_to_start_one(another: Host) -> None:
    ran = another.make("image", DOCKER_HOST="unix:///run/no-such-engine.sock")
    assert ran.status != 0
    assert "the Docker engine is not running; start it" in ran.lines[-2]


def test_without_permission_it_names_the_group(another: Host) -> None:
    status = another.root.stat()
    ran = subprocess.run(
        ["setpriv", f"--reuid={status.st_uid}", f"--regid={status.st_gid}", "--clear-groups",
         "make", "--no-print-directory", "image"],
        cwd=another.root, env=another.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "usermod -aG docker" in ran.stderr


def test_without_a_client_it_says_what_to_install(another: Host) -> None:
    ran = another.make("image", DOCKER="no-such-client")
    assert ran.status != 0
    assert "no-such-client is not installed; install Docker" in ran.output


def test_an_image_of_another_user_is_refused(another: Host, host: Host, image: Ran) -> None:
    give_to("daemon", another.root)
    ran = another.make("container", f"IMAGE={IMAGE}")
    assert ran.status != 0
    assert "this checkout belongs to" in ran.output
    give_to(USER, another.root)


def test_the_base_images_own_vllm_makes_room(
    base_image: str, another: Host, tmp_path: Path
) -> None:
    """As with vllm/vllm-openai for a base: a vLLM of the system's Python."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "setup.py").write_text(
        "from setuptools import setup\nsetup(name='vllm', version='0.25.1', packages=['vllm'])\n"
    )
    (tmp_path / "Dockerfile").write_text(
        f"FROM {base_image}\n"
        "RUN apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install "
        "--no-install-recommends python3-pip python3-setuptools python3-wheel >/dev/null\n"
        "COPY setup.py /src/\nCOPY vllm /src/vllm\n"
        "RUN python3 -m pip install -q --no-index --no-build-isolation "
        "--break-system-packages /src\n"
    )
    name = f"{NAME}-another-packaged:base"
    built = {"DOCKER_BUILDKIT": "1"}
    subprocess.run(
        [client(), "build", "-q", "-t", name, str(tmp_path)],
        env={**another.env, **built}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    probe = ["python3", "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    assert docker("run", "--rm", name, *probe) == "0.25.1"
    # Up to the step that the environment comes after.
    assert another.make("image", BASE_IMAGE="127.0.0.1:1/lays-out-the-context").status != 0
    context = another.root / ".workspace" / "container"
    given = {**another.env, "ENV": "uv", "BASE_IMAGE": name}
    told = another.run(
        "python3", "-c",
        "import json, os; from workspace.pins import release; "
        "from workspace.container import image; "
        "print(json.dumps(image.arguments(release.selected(), os.environ['BASE_IMAGE'])))",
        **given,
    ).output  # fmt: skip
    arguments = [f"--build-arg={key}={value}" for key, value in json.loads(told).items()]
    target = f"{NAME}-another-packaged:tools"
    subprocess.run(
        [client(), "build", "-q", "-t", target, "--target=tools", *arguments,
         f"--secret=id=index,src={context}/index.env",
         f"--file={another.root}/.devcontainer/Dockerfile", str(context)],
        env={**another.env, **built}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    find = "import importlib.util as u; print(u.find_spec('vllm'))"
    assert docker("run", "--rm", target, "/usr/bin/python3", "-c", find) == "None"


def test_the_build_says_its_steps_in_short_lines(image: Ran) -> None:
    steps = [line for line in image.lines if line.startswith("  [")]
    assert any("environment-uv" in line for line in steps)
    assert all(len(line) <= 103 for line in image.lines if line.startswith("  "))
