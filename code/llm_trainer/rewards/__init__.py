# SPDX-License-Identifier: Apache-2.0
"""Rewards of completions: built-in functions and the user's own, each called in a bounded process beside the worker."""
