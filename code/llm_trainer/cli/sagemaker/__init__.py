# SPDX-License-Identifier: Apache-2.0
"""The commands that talk to SageMaker: about training jobs, and about endpoints that serve their results."""
