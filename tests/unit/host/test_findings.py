# SPDX-License-Identifier: Apache-2.0
from llm_trainer.host.findings import Finding, format_finding


def test_a_finding_is_a_line_and_its_verdict_may_have_a_colour():
    finding = Finding("disk", "warning", "is slow: take another.")
    assert format_finding(finding, in_colour=False) == f"{'disk':14} warning  is slow: take another."
    assert format_finding(finding, in_colour=True) == f"{'disk':14} \033[33mwarning \033[0m is slow: take another."
