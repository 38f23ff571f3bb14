# SPDX-License-Identifier: Apache-2.0
"""`make instance-facts` writes the table that is there: it is of the pinned moto and botocore."""

import json
import sys

from support.checkout import SOURCE

sys.path.append(str(SOURCE / "docker"))
import instance_facts


def test_the_table_is_of_the_pinned_packages():
    written = json.loads((SOURCE / "code/llm_trainer/planning/instances.json").read_text(encoding="utf-8"))
    made = instance_facts.make_table()
    for table in (written, made):
        del table["made_on"]
    assert written == made, "run `make instance-facts`"
