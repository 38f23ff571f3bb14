# SPDX-License-Identifier: Apache-2.0
"""Jobs and endpoints on SageMaker, by boto3 alone: submitted, watched, fetched, served and deleted."""
