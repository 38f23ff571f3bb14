# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer metrics`: the metric definitions, for a person or for AlgorithmSpecification's MetricDefinitions."""

import json
from collections.abc import Sequence

from llm_trainer.common.metric_definitions import (
    define_metrics,
    list_metrics,
    list_objectives,
    list_reward_metrics,
)


def print_definitions(method: str, rewards: Sequence[str], as_json: bool) -> int:
    """Print a line for each metric of a method, or with `as_json` the list that CreateTrainingJob takes; return 0."""
    if as_json:
        print(json.dumps(define_metrics(method, rewards), indent=2))
        return 0
    meanings = list_metrics(method) | list_reward_metrics(rewards)
    for definition in define_metrics(method, rewards):
        print(f"{definition['Name']:30}{meanings[definition['Name']]:80}{definition['Regex']}")
    print(f"Objectives of automatic model tuning: {', '.join(list_objectives(method))}")
    return 0
