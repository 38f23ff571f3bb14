# SPDX-License-Identifier: Apache-2.0
"""Merging an adapter into its base, from disk to disk, one shard at a time."""
