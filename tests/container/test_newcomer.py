# SPDX-License-Identifier: Apache-2.0
"""The README's two commands on a machine that has git, make, g++ and python3, and nothing else."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.conftest import CROSS_SECTION, Ran, copy_of_this_checkout, docker
from workspace.container.docker import client
from workspace.environment import index

pytestmark = [pytest.mark.container, pytest.mark.slow]
TOOLS = ["git", "make", "g++", "python3"]
CERTIFICATE = "/etc/host-certificates.crt"


@pytest.fixture(scope="module")
def machine(base_image: str) -> Iterator[str]:
    """A bare Debian with those tools and a fresh checkout; the container's id.

    Of this machine it gets only how a package index is reached, as a user's own machine would
    have it.
    """
    command = ["run", "--detach", "--shm-size", "2g", "--workdir", "/srv"]
    for name, value in index.container_settings().items():
        command += ["--env", f"{name}={value}"]
    if certificate := index.certificate():
        command += ["--mount", f"type=bind,source={certificate},target={CERTIFICATE},readonly"]
        command += ["--env", f"PIP_CERT={CERTIFICATE}", "--env", f"SSL_CERT_FILE={CERTIFICATE}"]
    one = docker(*command, base_image, "sleep", "infinity")
    try:
        install = "apt-get -qq update && apt-get -qq install --no-install-recommends "
        docker(
            "exec",
            "--env",
            "DEBIAN_FRONTEND=noninteractive",
            one,
            "bash",
            "-c",
            install + " ".join(TOOLS),
        )
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "checkout"
            copy_of_this_checkout(root)
            docker("cp", str(root), f"{one}:/srv/checkout")
        docker("exec", one, "chown", "-R", "root:root", "/srv/checkout")
        yield one
    finally:
        docker("rm", "--force", "--volumes", one)


def run(machine: str, *command: str, **variables: str) -> Ran:
    settings = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    result = subprocess.run(
        [client(), "exec", "--workdir", "/srv/checkout", *settings, machine, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return Ran(result.returncode, result.stdout, 0)


def test_the_two_commands_work_and_install_nothing(machine: str) -> None:
    before = run(machine, "dpkg", "--get-selections").output
    bench = run(machine, "make", "bench")
    assert bench.status == 0, bench.output
    records = run(machine, "bash", "-c", "cat benchmarks/results/*.json")
    assert json.loads(records.output)["valid"] is True
    tests = run(machine, "make", "test", PYTEST_ADDOPTS=CROSS_SECTION)
    assert tests.status == 0, tests.output
    assert " passed" in tests.output
    assert run(machine, "dpkg", "--get-selections").output == before
