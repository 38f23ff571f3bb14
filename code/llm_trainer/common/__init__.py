# SPDX-License-Identifier: Apache-2.0
"""What every package may use: errors, the log, files, units, ranks and processes."""
