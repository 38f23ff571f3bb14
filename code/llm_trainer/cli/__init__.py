# SPDX-License-Identifier: Apache-2.0
"""The commands of `llm-trainer`, one module each. They may use everything below."""
