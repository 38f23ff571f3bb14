# SPDX-License-Identifier: Apache-2.0
"""Folders, functions and docstrings keep the measures of the house. tests/support/measures.py finds what does not."""

import pytest

from support import measures

SAMPLE = '''
"""A module."""

def documented(self, a, b, c, d, e):
    """Return nothing."""

def _private(a, *, b, c, d, e, f):
    def inner():
        pass

class Public:
    """A class."""

    def bare(self):
        pass

    def _own(self):
        pass

class _Private:
    def hidden(self):
        pass
'''


def test_what_exceeds_a_measure_is_found(tmp_path):
    branches = "".join(f"    if x == {number}:\n        x += 1\n" for number in range(10))
    (tmp_path / "package").mkdir()
    (tmp_path / "package/sample.py").write_text(SAMPLE + f"\ndef tangled(x):\n{branches}" + "    x = 0\n" * 10)
    assert measures.find_undocumented(tmp_path) == ["package/sample.py:14 bare", "package/sample.py:24 tangled"]
    assert measures.find_many_arguments(tmp_path) == ["package/sample.py:7 _private"]
    assert measures.find_long_functions(tmp_path) == ["package/sample.py:24 tangled 31"]
    (complex_function,) = measures.find_complex_functions(tmp_path)
    assert complex_function == "package/sample.py:24 `tangled` is too complex (11 > 10)"
    for number in range(15):
        (tmp_path / f"package/module_{number}.py").touch()
    assert measures.find_full_folders(tmp_path) == ["package 16"]


@pytest.mark.parametrize("title", [title for title in measures.MEASURES if "complexity" not in title])
def test_nothing_exceeds_the_measure(title):
    assert measures.MEASURES[title]() == []


def test_few_functions_are_complex():
    assert len(measures.find_complex_functions()) <= 10, measures.find_complex_functions()
