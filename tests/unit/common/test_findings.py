# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.common.findings import GIB, MIB, Finding, as_row, show_bytes


def test_a_finding_is_a_line_and_its_verdict_may_have_a_colour():
    finding = Finding("disk", "warning", "is slow: take another.")
    assert as_row(finding, in_colour=False) == f"{'disk':14} warning  is slow: take another."
    assert as_row(finding, in_colour=True) == f"{'disk':14} \033[33mwarning \033[0m is slow: take another."


@pytest.mark.parametrize(("size", "text"), [(64 * MIB, "64 MiB"), (80 * GIB, "80 GiB"), (9.6 * GIB, "9.6 GiB")])
def test_sizes_are_short(size, text):
    assert show_bytes(size) == text
