# SPDX-License-Identifier: Apache-2.0
"""A user's machine with a Docker engine: the real engine, a base image made from Debian's packages,
and a checkout that belongs to somebody who is not root.

What is built once serves all tests here: the image, the container that the devcontainer CLI opens,
and a snapshot of it.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from filelock import FileLock
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from tests.workspace.conftest import (
    clean_environment,
    copy_files_of_this_checkout,
    require_space,
)
from workspace.container.docker import client
from workspace.container.image import PREFIX
from workspace.environment.index import index_url
from workspace.host.paths import ROOT
from workspace.pins.model import load

USER = "games"  # every Debian has it, and nobody logs in as it
BASE = f"{PREFIX}-debian"
NAME = f"{PREFIX}-test"
SMALL = f"{NAME}-small"
SUITE = "bookworm"
GIGABYTES = 32
"""That the engine's disk must have: an image has 10, making it takes as many, and a bare machine
has an environment of its own."""
PASSWORD = "correct-horse-battery-staple"
"""Of the package index that the image is built from; indexes that ask for none ignore it."""

CROSS_SECTION = (
    "-m 'not slow and not engine' "
    "-k 'test_doctor or doctor_has or test_install or test_files or test_matches_exact'"
)
"""pytest's options for `make test` inside a container: all is set up for it, and a part is run. The
whole runs outside, in this very run."""


@dataclass
class Ran:
    """What a command did."""

    status: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


@dataclass
class Host:
    """A user with a checkout on a machine with an engine."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Run a command in the checkout as its owner, who may talk to the engine."""
        status = self.root.stat()
        groups = f"{status.st_gid},{Path('/var/run/docker.sock').stat().st_gid}"
        user = ["setpriv", f"--reuid={status.st_uid}", f"--regid={status.st_gid}"]
        return subprocess.Popen(
            [*user, f"--groups={groups}", *command],
            cwd=self.root,
            env={**self.env, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(self, *command: str, **variables: str) -> Ran:
        """`start`, until it ends; standard output and error are one text."""
        began = time.monotonic()
        process = self.start(*command, **variables)
        output, _ = process.communicate()
        return Ran(process.returncode, output, time.monotonic() - began)

    def make(self, *arguments: str, **variables: str) -> Ran:
        return self.run("make", "--no-print-directory", *arguments, **variables)


def docker(*arguments: str, check: bool = True) -> str:
    """The engine, asked by the test itself."""
    result = subprocess.run([client(), *arguments], capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, result.stderr
    return result.stdout.strip()


def copy_of_this_checkout(root: Path) -> None:
    """A clone with today's files, as a user has one; nothing is set up in it.

    Its kernels are for one architecture: the run outside compiles them for all.
    """
    subprocess.run(["git", "clone", "-q", f"file://{ROOT}", str(root)], check=True)
    copy_files_of_this_checkout(root)
    pins = (root / "pins.toml").read_text()
    one = re.sub(r"^architectures = .*", 'architectures = ["9.0a"]', pins, flags=re.MULTILINE)
    (root / "pins.toml").write_text(one)


def give_to(user: str, folder: Path) -> None:
    entry = pwd.getpwnam(user)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def index_with_password() -> str:
    """The index that this machine asks, by an address with a user and a password in it."""
    address = urlsplit(index_url() or PYPI_SIMPLE_ENDPOINT)
    place = address.netloc.rpartition("@")[2]
    return urlunsplit(address._replace(netloc=f"reader:{PASSWORD}@{place}"))


def new_host(base: str, name: str = NAME) -> Host:
    """A checkout that belongs to `USER`, whose image and volumes have names of their own."""
    home = Path(tempfile.mkdtemp(prefix="vllm-kernels-host-"))
    home.chmod(0o755)
    root = home / "checkout"
    copy_of_this_checkout(root)
    # The names of a developer's own image and volumes stay theirs.
    description = root / ".devcontainer" / "devcontainer.json"
    description.write_text(description.read_text().replace('"vllm-kernels:dev"', f'"{name}:dev"'))
    give_to(USER, home)
    root_only = ("PYTHON", "DEVICE", "PYENV_ROOT")
    kept = {k: v for k, v in clean_environment().items() if k not in root_only}
    return Host(
        root,
        kept
        | {
            "HOME": str(home),
            "USER": name,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "DOCKER": client(),
            "ENV": "uv",
            "BASE_IMAGE": base,
            "PIP_INDEX_URL": index_with_password(),
        },
    )


def forget(name: str) -> None:
    """Remove from the engine all containers, images and volumes of that name."""
    volumes = [
        volume
        for volume in docker("volume", "ls", "--quiet").split()
        if volume.startswith(f"{PREFIX}-") and volume.endswith(f"-{name}")
    ]
    containers = {
        container
        for volume in volumes
        for container in docker("ps", "--all", "--quiet", "--filter", f"volume={volume}").split()
    }
    # By the name each was started with: two names may be one image.
    for line in docker("ps", "--all", "--format", "{{.ID}} {{.Image}}").splitlines():
        container, _, image = line.partition(" ")
        containers |= {container} if image.startswith(name) else set()
    for container in containers:
        docker("rm", "--force", container)
    for image in docker("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines():
        if image.startswith(name):
            docker("rmi", "--force", image)
    for volume in volumes:
        docker("volume", "rm", volume)


def remove(host: Host, name: str = NAME) -> None:
    """All that a host's checkout left in the engine, and the checkout."""
    label = f"label=devcontainer.local_folder={host.root}"
    for one in docker("ps", "--all", "--quiet", "--filter", label).split():
        docker("rm", "--force", one)
    forget(name)
    shutil.rmtree(host.root.parent)


def fetched_packages() -> set[str]:
    """The caches of packages that builds of images left in the engine."""
    caches = json.loads(docker("system", "df", "--verbose", "--format", "{{json .BuildCache}}"))
    mount = "cached mount /var/cache/uv "
    return {one["ID"] for one in caches or () if one["Description"].startswith(mount)}


@pytest.fixture(scope="session")
def base_image() -> str:
    """A minimal Debian, as `debootstrap` makes it; no registry is asked. Made by one process."""
    folder = Path(docker("info", "--format", "{{.DockerRootDir}}"))
    if folder.is_dir():  # else it is another machine's
        require_space(folder, GIGABYTES)
    name = f"{BASE}:{SUITE}"
    with FileLock(Path(tempfile.gettempdir(), f"{BASE}.lock")):
        if docker("images", "--quiet", name):
            return name
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                ["debootstrap", "--variant=minbase", SUITE, folder],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as tar:
                subprocess.run(
                    [client(), "import", "-", name],
                    stdin=tar.stdout, check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip
    return name


@contextmanager
def second_engine(base_image: str, *options: str, megabytes: int | None = None) -> Iterator[str]:
    """An engine of the test's own, which has the base image; its address. With `megabytes`, that
    is all the disk it has."""
    folder = Path(tempfile.mkdtemp(prefix="engine-"))
    folder.chmod(0o755)
    data, address = folder / "data", f"unix://{folder}/docker.sock"
    data.mkdir()
    if megabytes:
        size = f"size={megabytes}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(data)], check=True)
    # In a network of its own: it would take the bridge of the first one away.
    command = [
        "unshare",
        "--net",
        "dockerd",
        "--data-root",
        str(data),
        "--exec-root",
        str(folder / "exec"),
    ]
    command += ["--pidfile", str(folder / "pid"), "--host", address, "--group", "docker"]
    command += ["--bridge", "none", "--iptables=false", *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    ask = [client(), "--host", address]
    try:
        while subprocess.run([*ask, "info"], capture_output=True, check=False).returncode:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        with subprocess.Popen([client(), "save", base_image], stdout=subprocess.PIPE) as saved:
            subprocess.run([*ask, "load", "--quiet"], stdin=saved.stdout, check=True)
        yield address
    finally:
        process.terminate()
        process.wait()
        if megabytes:
            subprocess.run(["umount", str(data)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def host(base_image: str) -> Iterator[Host]:
    """The user whose image, container and snapshot the tests share."""
    forget(NAME)  # what a run that was ended half way left
    made = new_host(base_image)
    yield made
    remove(made)


@pytest.fixture(scope="session")
def image(host: Host) -> Ran:
    """`make image` on a machine that has none."""
    before = fetched_packages()
    ran = host.make("image")
    assert ran.status == 0, ran.output
    for one in fetched_packages() - before:  # 8.5 GB, of no more use
        docker("builder", "prune", "--force", "--filter", f"id={one}")
    return ran


@pytest.fixture(scope="session")
def devcontainer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The devcontainer CLI's command, at its pinned version."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name} for the devcontainer CLI")
    folder = Path(tempfile.mkdtemp(prefix="devcontainer-cli-"))
    folder.chmod(0o755)
    wanted = f"@devcontainers/cli@{load().container.devcontainers_cli}"
    subprocess.run(
        ["npm", "install", "--silent", "--no-save", "--prefix", str(folder), wanted],
        check=True,
    )  # fmt: skip
    program = folder / "node_modules" / "@devcontainers" / "cli" / "devcontainer.js"
    return [shutil.which("node") or "node", str(program)]


@pytest.fixture(scope="session")
def container(host: Host, image: Ran, devcontainer: list[str]) -> Ran:
    """What VS Code does on "Reopen in Container", through the CLI; `make dev` runs in it."""
    return up(host, devcontainer)


def up(host: Host, cli: list[str], **variables: str) -> Ran:
    ran = host.run(
        *cli, "up", "--docker-path", host.env["DOCKER"], "--workspace-folder", str(host.root),
        **variables,
    )  # fmt: skip
    assert ran.status == 0, ran.output
    return ran


def inside(host: Host, cli: list[str], *command: str) -> Ran:
    """A command in the container, as VS Code's terminal runs it."""
    return host.run(
        *cli, "exec", "--docker-path", host.env["DOCKER"], "--workspace-folder", str(host.root),
        *command,
    )  # fmt: skip


@pytest.fixture(scope="session")
def snapshot(host: Host, container: Ran) -> Ran:
    """`make snapshot TAG=tuned` of that container, with work of the user's in both trees."""
    tree = host.root / "vllm-fork" / "src"
    (tree / "vllm" / "mine.py").write_text("VALUE = 1\n")
    for command in (["add", "vllm/mine.py"], ["commit", "-q", "-m", "Add mine"]):
        ran = host.run(
            "git", "-C", str(tree), "-c", "user.name=U", "-c", "user.email=u@example.invalid",
            *command,
        )  # fmt: skip
        assert ran.status == 0, ran.output
    (tree / "vllm" / "edited.py").write_text("VALUE = 2\n")
    (host.root / "notes.txt").write_text("an edit in the workspace\n")
    ran = host.make("snapshot", f"TAG={NAME}-snapshot:tuned")
    assert ran.status == 0, ran.output
    return ran


@pytest.fixture
def small(base_image: str, image: Ran) -> Iterator[Host]:
    """A checkout in whose container nothing was set up: it is committed in seconds."""
    made = new_host(base_image, SMALL)
    docker("tag", f"{NAME}:dev", f"{SMALL}:dev")
    yield made
    remove(made, SMALL)
