# SPDX-License-Identifier: Apache-2.0
"""A checked job, and the state on disk that its launcher and its workers share."""
