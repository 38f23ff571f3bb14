# SPDX-License-Identifier: Apache-2.0
"""A training container for Amazon SageMaker that fine-tunes language models.

Read `train.py` first, the story of a job; docs/architecture.md has the map of the packages.
"""

__version__ = "0.1.0"
