# SPDX-License-Identifier: Apache-2.0
"""Weights that ranks hold in shards: how FSDP2 gets them, and checkpoints of either kind."""
