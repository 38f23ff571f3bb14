# SPDX-License-Identifier: Apache-2.0
"""The hosts of a job among themselves: how their launchers meet, hear of each other, and go on without one."""
