# SPDX-License-Identifier: Apache-2.0
"""Layers that compute what a library's layers do, in fewer or cheaper steps."""
