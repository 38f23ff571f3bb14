# SPDX-License-Identifier: Apache-2.0
"""The result of a job: written, proven to compute what was trained, described, and published."""
