# SPDX-License-Identifier: Apache-2.0
"""`make kernels`: compile what changed."""


def run(arch: str | None = None) -> None:
    pass
