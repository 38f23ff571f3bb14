# SPDX-License-Identifier: Apache-2.0
"""Settings and environment of a job, read, checked, and sorted into sections."""
