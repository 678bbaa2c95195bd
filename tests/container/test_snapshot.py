# SPDX-License-Identifier: Apache-2.0
"""`make snapshot`, `snapshots` and `snapshot-verify` on a real engine."""

from __future__ import annotations

import json
import os
import secrets
import signal
import string
import subprocess
import time

import pytest

from tests.container.conftest import NAME, SMALL, Host, Ran, docker
from tests.workspace.conftest import SMALL_BENCH
from workspace.container.snapshot import SNAPSHOT, UNFINISHED

pytestmark = [pytest.mark.container, pytest.mark.slow]
TUNED = f"{NAME}-snapshot:tuned"
HOME = "/home/dev"


def token(prefix: str = "hf_") -> str:
    """A token of the right shape that nobody ever had."""
    letters = string.ascii_letters + string.digits
    return prefix + "".join(secrets.choice(letters) for _ in range(34))


def unfinished() -> list[str]:
    """What a snapshot that did not end left in the engine."""
    label = f"label={UNFINISHED}=yes"
    containers = docker("ps", "--all", "--quiet", "--filter", label).split()
    return containers + docker("images", "--quiet", "--filter", label).split()


# --- a snapshot of the whole -----------------------------------------------------------------


def test_it_starts_without_a_network_and_compiles_nothing(host: Host, snapshot: Ran) -> None:
    ran = host.make("snapshot-verify", f"TAG={TUNED}")
    assert ran.status == 0, ran.output
    for promise in ("make dev has nothing to do", "imported in", "kernels load: gemm.cublaslt"):
        assert promise in ran.output


def test_import_is_much_faster_than_setting_up(container: Ran, image: Ran, snapshot: Ran) -> None:
    """About ten times on a quiet machine. What else runs there slows either down, so the best of
    three counts, and half of that is enough."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        place = docker(
            "run", "--rm", "--network", "none", TUNED,
            "python", "-c", "import vllm; print(vllm.__file__)",
        )  # fmt: skip
        times.append(time.monotonic() - began)
        assert place.startswith("/workspaces/vllm-kernels/vllm-fork/releases/")
        if container.seconds > 10 * times[-1]:
            break
    print(f"import vllm in a new container: {times} s; set-up: {container.seconds:.0f} s")
    assert container.seconds > 5 * min(times)


def test_vllm_runs_our_kernel_from_it_without_a_network(host: Host, snapshot: Ran) -> None:
    script = f"make bench {' '.join(SMALL_BENCH)} && cat benchmarks/results/*.json"
    told = docker(
        "run", "--rm", "--network", "none", "--shm-size", "2g", TUNED, "bash", "-c", script
    )
    record = json.loads(told[told.index("\n{") :] if "\n{" in told else told)
    assert record["valid"] is True


def test_the_users_work_in_both_trees_is_in_it_and_recorded(host: Host, snapshot: Ran) -> None:
    told = json.loads(docker("image", "inspect", TUNED))[0]["Config"]["Labels"]
    record = json.loads(told[SNAPSHOT])
    assert record["workspace"]["commit"] == host.run("git", "rev-parse", "HEAD").output.strip()
    assert record["workspace"]["dirty"] is True
    (fork,) = record["fork"].values()
    assert fork["own_commits"] == 1
    assert fork["dirty"] is True
    script = "cat notes.txt vllm-fork/src/vllm/edited.py; git -C vllm-fork/src log --format=%s -1"
    found = docker("run", "--rm", "--network", "none", TUNED, "bash", "-c", script)
    assert found == "an edit in the workspace\nVALUE = 2\nAdd mine"
    recorded = docker("run", "--rm", TUNED, "bash", "-c", "cat /opt/vllm-kernels/snapshot/*")
    assert "+an edit in the workspace" in recorded
    assert "Subject: [PATCH] Add mine" in recorded


def test_a_snapshot_that_was_changed_does_not_pass(snapshot: Ran, host: Host) -> None:
    changed = docker("run", "--detach", TUNED, "bash", "-c", "echo >> README.md")
    docker("wait", changed)
    docker("commit", changed, f"{NAME}-snapshot:changed")
    docker("rm", changed)
    ran = host.make("snapshot-verify", f"TAG={NAME}-snapshot:changed")
    assert ran.status != 0
    assert "is not what commit" in ran.output


def test_they_are_listed_with_size_date_and_versions(host: Host, snapshot: Ran) -> None:
    ran = host.make("snapshots")
    (line,) = [line for line in ran.lines if line.startswith(TUNED)]
    for part in (" GB", "vllm 0.", "torch 2.", "cuda ", "with edits", "1 commits, edits"):
        assert part in line


def test_its_containers_do_not_pass_for_the_checkouts_own(host: Host, snapshot: Ran) -> None:
    one = docker("run", "--detach", TUNED, "sleep", "60")
    ran = host.make("shell", "CMD=hostname")
    docker("rm", "--force", one)
    assert ran.status == 0, ran.output


def test_a_name_in_use_is_not_replaced_without_a_word(host: Host, snapshot: Ran) -> None:
    before = docker("image", "inspect", "--format", "{{.Id}}", TUNED)
    ran = host.make("snapshot", f"TAG={TUNED}")
    assert ran.status != 0
    assert "FORCE=1 to replace it" in ran.output
    assert docker("image", "inspect", "--format", "{{.Id}}", TUNED) == before


@pytest.mark.parametrize("tag", ["two words", "UPPER/case:x", "-x"])
def test_a_name_that_no_image_can_have_is_refused(host: Host, tag: str) -> None:
    ran = host.make("snapshot", f"TAG={tag}")
    assert ran.status != 0
    assert "cannot name an image" in ran.output


def test_the_runs_container_goes_on_with_all_it_had(
    host: Host, container: Ran, snapshot: Ran
) -> None:
    ran = host.make("shell", "CMD=make dev && ls /mnt")
    assert ran.status == 0, ran.output
    assert unfinished() == []


# --- what must not get into one ----------------------------------------------------------------


def open_container(host: Host, *arguments: str) -> str:
    """The checkout's container, as somebody started it by hand."""
    labels = [
        f"devcontainer.local_folder={host.root}",
        f"devcontainer.config_file={host.root}/.devcontainer/devcontainer.json",
    ]
    command = ["run", "--detach", *(part for label in labels for part in ("--label", label))]
    mount = f"type=bind,source={host.root},target=/workspaces/vllm-kernels"
    return docker(*command, "--mount", mount, *arguments, f"{SMALL}:dev", "sleep", "infinity")


def snapshots_of_small() -> list[str]:
    return docker("images", "--quiet", "--no-trunc", f"{SMALL}-snapshot").split()


def refused(host: Host, value: str, name: str) -> None:
    """No snapshot comes out, the message names the place and never the value."""
    ran = host.make("snapshot", f"TAG={SMALL}-snapshot:x")
    assert ran.status != 0, ran.output
    assert name in ran.output
    assert value not in ran.output
    assert snapshots_of_small() == []
    assert unfinished() == []


def test_without_any_credentials_the_same_container_is_taken(small: Host) -> None:
    open_container(small)
    ran = small.make("snapshot", f"TAG={SMALL}-snapshot:x")
    assert ran.status == 0, ran.output
    assert len(snapshots_of_small()) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("HF_TOKEN", "{}"), ("PIP_INDEX_URL", "https://reader:{}@index.invalid/simple")],
)
def test_a_credential_in_the_containers_settings_is_refused(
    small: Host, name: str, text: str
) -> None:
    value = token()
    open_container(small, "--env", f"{name}={text.format(value)}")
    refused(small, value, name)


# Every kind of credential and place is tried on small images in tests/workspace.
FILES = {
    f"{HOME}/.cache/huggingface/token": "{}",
    f"{HOME}/.config/pip/pip.conf": "[global]\nindex-url = https://me:{}@index.invalid/simple\n",
    f"{HOME}/.ssh/id_ed25519": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n",
    "/opt/anywhere/notes.txt": "use {} for this\n",
}


@pytest.mark.parametrize("place", FILES)
def test_a_credential_in_a_file_is_refused(small: Host, place: str) -> None:
    value = token()
    one = open_container(small)
    folder = place.rpartition("/")[0]
    text = FILES[place].format(value)
    script = f"mkdir -p {folder} && cat > {place}"
    subprocess.run(
        [small.env["DOCKER"], "exec", "--interactive", "--user", "0", one, "bash", "-c", script],
        input=text, text=True, check=True,
    )  # fmt: skip
    refused(small, value, place.rpartition("/")[2])


def test_a_history_is_left_out_and_stays_in_the_container(small: Host) -> None:
    value = token()
    one = open_container(small)
    places = [f"{HOME}/.python_history", "/var/lib/.bash_history"]
    for place in places:
        docker("exec", "--user", "0", one, "sh", "-c", f"echo 'login {value}' > {place}")
    ran = small.make("snapshot", f"TAG={SMALL}-snapshot:x")
    assert ran.status == 0, ran.output
    for place in places:
        assert place in ran.output
        assert value in docker("exec", one, "cat", place)
        found = docker("run", "--rm", f"{SMALL}-snapshot:x", "sh", "-c", f"ls {place} || true")
        assert found == ""


def test_a_credential_in_the_checkout_is_refused(small: Host) -> None:
    value = token()
    (small.root / ".env").write_text(f"HF_TOKEN={value}\n")
    open_container(small)
    refused(small, value, ".env")


def test_a_password_in_a_remotes_address_stays_behind(small: Host) -> None:
    value = token("")
    address = f"https://me:{value}@code.invalid/kernels.git"
    assert small.run("git", "remote", "add", "mine", address).status == 0
    open_container(small)
    ran = small.make("snapshot", f"TAG={SMALL}-snapshot:x")
    assert ran.status == 0, ran.output
    found = docker("run", "--rm", f"{SMALL}-snapshot:x", "git", "config", "--list")
    assert value not in found


# --- cut off ------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_leaves_no_image_and_the_next_one_clears_up(small: Host) -> None:
    open_container(small)
    for delay in (0.3, 0.8, 1.5, 2.5, 4.0):
        process = small.start("make", "snapshot", f"TAG={SMALL}-snapshot:x")
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert snapshots_of_small() == []
        else:
            docker("rmi", f"{SMALL}-snapshot:x")
    ran = small.make("snapshot", f"TAG={SMALL}-snapshot:x")
    assert ran.status == 0, ran.output
    assert unfinished() == []


def test_stopped_half_way_the_container_is_taken_or_refused_whole(small: Host) -> None:
    one = open_container(small)
    process = small.start("make", "snapshot", f"TAG={SMALL}-snapshot:x")
    time.sleep(1)
    docker("kill", one)
    output, _ = process.communicate()
    if process.returncode:
        assert snapshots_of_small() == []
        assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1
    else:
        # The files were taken whole; the container itself is not needed for more.
        found = docker("run", "--rm", f"{SMALL}-snapshot:x", "git", "status", "--short")
        assert found == small.run("git", "status", "--short").output.strip()
    assert unfinished() == []


def test_without_a_container_it_says_what_to_run(small: Host) -> None:
    ran = small.make("snapshot")
    assert ran.status != 0
    assert "this checkout has no container yet; run: make container" in ran.output
