# SPDX-License-Identifier: Apache-2.0
"""`make capture`: the operations and shapes of a real run, and how often each is called."""
