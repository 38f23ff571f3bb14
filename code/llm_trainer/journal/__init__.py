# SPDX-License-Identifier: Apache-2.0
"""The journal of a job: everything that is measured and happens, one JSON object a line."""
