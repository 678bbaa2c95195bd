# SPDX-License-Identifier: Apache-2.0
"""``.cu`` files become plain shared libraries behind apache-tvm-ffi: nvcc, content-addressed."""
