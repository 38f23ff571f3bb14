# SPDX-License-Identifier: Apache-2.0
"""Rows become tokens and labels: formats, chat templates, the cache, splits, streams, and the report on them."""
