# SPDX-License-Identifier: Apache-2.0
"""`make watch`: compile, check and time a kernel whenever it is saved."""
