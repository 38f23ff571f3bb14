# SPDX-License-Identifier: Apache-2.0
"""report.html: the page that shows a run, made from its journal."""
