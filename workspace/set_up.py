# SPDX-License-Identifier: Apache-2.0
"""Bring the fork, its install and the kernels up to date, as far as a verb needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from workspace import verbs
from workspace.environment.device import device
from workspace.fork import install, prepare
from workspace.host import setup_lock


def engine(*, renew: bool = False, force: bool = False) -> None:
    """The fork's tree, its binaries and its editable install; `renew` and `force` as in
    `install.install_fork`."""
    prepare.ensure()
    install.install_fork(device(), renew=renew, force=force)


def kernels(arch: str | None = None, operation: str | None = None) -> None:
    """The kernels' package, and every kernel (of an operation) compiled."""
    install.install_kernels()
    from workspace import kernels as package  # imports what was installed a step ago

    package.compile_all(package.architectures(arch), operation)


def kernels_for_device(operation: str | None) -> None:
    """The kernels' package, and what this machine's device can run of it compiled: on a CPU
    nothing."""
    install.install_kernels()
    from workspace import kernels as package

    package.compile_for_device(device(), operation)


def package_only() -> None:
    """The kernels' package with nothing compiled: for verbs that compile what they need, and must
    start also when a kernel does not compile."""
    up_to_date(install.install_kernels)


def up_to_date(*steps: Callable[[], None]) -> None:
    """Take these steps side by side, none of which needs another, then let the next make in."""
    with ThreadPoolExecutor() as pool:
        for step in [pool.submit(step) for step in steps]:
            step.result()
    setup_lock.release()


def compile_fork(options: verbs.ForkBuild) -> None:
    """vLLM's own C++ and CUDA into a tree that is set up; nobody else is let in before the end."""
    engine(force=options.force)
    install.install_kernels()
    from workspace.fork import build

    build.run(device(), options)
