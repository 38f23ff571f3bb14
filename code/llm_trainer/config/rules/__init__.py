# SPDX-License-Identifier: Apache-2.0
"""Rules between settings that are each valid: their form, and the table of them."""
