# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer metrics`: the metric definitions, for a person or for AlgorithmSpecification's MetricDefinitions."""

import json

from llm_trainer.common.metric_definitions import METRICS, OBJECTIVES, define_metrics


def print_definitions(as_json: bool) -> int:
    """Print a line for each metric, or with `as_json` the list that CreateTrainingJob takes; return exit code 0."""
    if as_json:
        print(json.dumps(define_metrics(), indent=2))
        return 0
    for definition in define_metrics():
        print(f"{definition['Name']:30}{METRICS[definition['Name']]:80}{definition['Regex']}")
    print(f"Objectives of automatic model tuning: {', '.join(OBJECTIVES)}")
    return 0
