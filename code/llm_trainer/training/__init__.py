# SPDX-License-Identifier: Apache-2.0
"""The training itself: trainers, packing, checkpoints, stops, and the lines that a training logs."""
