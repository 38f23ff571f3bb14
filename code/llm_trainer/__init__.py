# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes language models inside a SageMaker training container. Read the modules in design order:
environment, settings, preflight, launch, train, formats, data, model, adapters, trainer, export."""

__version__ = "0.1.0"
