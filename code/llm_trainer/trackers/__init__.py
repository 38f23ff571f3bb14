# SPDX-License-Identifier: Apache-2.0
"""The process that follows the journal and sends what is new to MLflow, Weights & Biases or TensorBoard."""
