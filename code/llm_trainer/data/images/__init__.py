# SPDX-License-Identifier: Apache-2.0
"""Images of rows as a model's own processor sees them: their tokens in a row, and their pixels in a batch."""
