# SPDX-License-Identifier: Apache-2.0
"""The rewards and the function of docs/rewards.md work, and its tables name what there is."""

import json
import re

from llm_trainer.rewards.options import OPTIONS
from llm_trainer.rewards.problems import find_problems
from llm_trainer.rewards.rewards import load_rewards
from support.documents import DOCS, read_blocks
from support.waiting import GUARD_SECONDS

PAGE = DOCS / "rewards.md"


def test_its_job_and_its_function_work(tmp_path):
    settings, function = (block.text for block in read_blocks(PAGE))
    (tmp_path / "rewards.py").write_text(function)
    chosen, channels = json.loads(settings), {"rewards": tmp_path}
    functions, options = chosen["reward_functions"], chosen["reward_options"]
    assert list(find_problems(functions, options, chosen["reward_weights"], channels, ["answer"])) == []
    loaded = load_rewards(functions, options, channels, GUARD_SECONDS)
    texts = ["Please: $x = 4$", "5"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert [reward(["2+2?"] * 2, completions, [[0] * 9, [0] * 600], answer=["4", "4"]) for reward in loaded] == [
        [1.0, 0.0],
        [0.0, -1.0],
        [1.0, 0.0],
    ]
    for reward in loaded:
        reward.process.close()


def test_its_table_has_all_built_ins_with_their_options():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows if name in OPTIONS} == {
        name: set(options) for name, options in OPTIONS.items()
    }
