# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the container: starts the workers of a host, watches over them, and keeps in touch with the other hosts."""
