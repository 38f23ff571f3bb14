# SPDX-License-Identifier: Apache-2.0
"""The memory and the arithmetic of a training step, computed before any weight is loaded."""
