# SPDX-License-Identifier: Apache-2.0
"""A training container for Amazon SageMaker that fine-tunes language models. docs/architecture.md has the map."""

__version__ = "0.1.0"
