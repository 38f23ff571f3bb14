# SPDX-License-Identifier: Apache-2.0
"""The teacher of a distillation: found fit for its student before any weights load, and how it is loaded."""
