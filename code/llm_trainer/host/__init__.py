# SPDX-License-Identifier: Apache-2.0
"""The host of a process: GPUs, driver, memory, disks and network, by what is there."""
