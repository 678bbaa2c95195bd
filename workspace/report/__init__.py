# SPDX-License-Identifier: Apache-2.0
"""`make report`: recorded results as one page of HTML that needs neither server nor network."""
