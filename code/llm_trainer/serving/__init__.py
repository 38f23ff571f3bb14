# SPDX-License-Identifier: Apache-2.0
"""The files with which AWS's LMI container serves a result, and what it cannot load of an adapter."""
