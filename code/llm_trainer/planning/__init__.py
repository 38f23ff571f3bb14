# SPDX-License-Identifier: Apache-2.0
"""The plan of a job on SageMaker's instance types, before it starts: their facts, its time, its price."""
