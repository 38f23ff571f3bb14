# SPDX-License-Identifier: Apache-2.0
"""Raw rows from files of every common kind, and from data sets of the Hugging Face Hub."""
