# SPDX-License-Identifier: Apache-2.0
"""The documents' examples name what the pinned SageMaker SDK has, and import no module that it is about to remove."""

import ast
import importlib

import pytest

from support.documents import DOCUMENTS, read_blocks

pytest.importorskip("sagemaker.train", reason="the SDK is not installed here: run `make test-notebook`")

BLOCKS = [
    block
    for document in DOCUMENTS
    for block in read_blocks(document)
    if block.language == "python" and "sagemaker" in block.text
]
SHIM = "sagemaker.train.configs"  # deprecated in favour of sagemaker.core.training.configs


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_what_an_example_imports_is_there(block):
    imports = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        assert node.module != SHIM
        module = importlib.import_module(node.module)
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
