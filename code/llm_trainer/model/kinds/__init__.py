# SPDX-License-Identifier: Apache-2.0
"""The kinds of models: the class that builds the model of a config, and the parts of one that see images."""
