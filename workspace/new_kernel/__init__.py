# SPDX-License-Identifier: Apache-2.0
"""`make new-kernel`: scaffold a working kernel."""
