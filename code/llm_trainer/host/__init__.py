# SPDX-License-Identifier: Apache-2.0
"""This host: GPUs, driver, memory, disks and network, by what is there."""
