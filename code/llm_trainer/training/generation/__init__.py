# SPDX-License-Identifier: Apache-2.0
"""Parts of methods whose model writes what it is trained on: prompts, stops within a step, and an exact resume."""
