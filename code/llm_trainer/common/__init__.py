# SPDX-License-Identifier: Apache-2.0
"""Helpers that every package may use: errors, the log, files, retries, units, ranks and processes."""
