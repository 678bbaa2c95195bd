# SPDX-License-Identifier: Apache-2.0
"""Update the fork, its installation and the kernels, as far as a verb needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from workspace import verbs
from workspace.fork import install, prepare
from workspace.host import setup_lock
from workspace.host.settings import device


def engine(*, renew: bool = False, force: bool = False) -> None:
    """The tree of the fork and its installation; arguments as for `install.install_fork`."""
    prepare.ensure()
    install.install_fork(device(), renew=renew, force=force)


def kernels(arch: str | None = None, operation: str | None = None) -> None:
    """The package of the kernels, and every kernel (of an operation) compiled."""
    install.install_kernels()
    from workspace import editor  # both import what was just installed
    from workspace import kernels as package

    architectures = package.architectures(arch)
    editor.write()  # first: an editor helps most with a kernel that does not compile
    package.compile_all(architectures, operation)


def kernels_for_device(operation: str | None) -> None:
    """The package of the kernels, and the kernels that this machine's GPU can run compiled."""
    install.install_kernels()
    from workspace import kernels as package

    package.compile_for_device(device(), operation)


def package_only() -> None:
    """Only the package of the kernels: for verbs that compile what they need, and must start also
    when a kernel does not compile."""
    up_to_date(install.install_kernels)


def up_to_date(*steps: Callable[[], None]) -> None:
    """Run independent steps in parallel, then release the set-up lock."""
    with ThreadPoolExecutor() as pool:
        for step in [pool.submit(step) for step in steps]:
            step.result()
    setup_lock.release()


def compile_fork(options: verbs.ForkBuild) -> None:
    """Compile vLLM's C++ and CUDA; the set-up lock is kept until the end."""
    engine(force=options.force)
    install.install_kernels()
    from workspace.fork import build

    build.run(device(), options)
