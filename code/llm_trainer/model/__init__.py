# SPDX-License-Identifier: Apache-2.0
"""The base model and its adapter: how they are loaded, on which device, in which precision, with which kernels."""
