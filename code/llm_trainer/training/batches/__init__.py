# SPDX-License-Identifier: Apache-2.0
"""Batches: which rows they have, facts about them, and means over what is in them, on any number of ranks."""
