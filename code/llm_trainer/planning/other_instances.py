# SPDX-License-Identifier: Apache-2.0
"""Other instances for a job that has ended: the cheapest, the fastest and the best value."""

from dataclasses import replace

from llm_trainer.journal.manifest import Manifest
from llm_trainer.planning.candidates import Outline, list_candidates
from llm_trainer.planning.choice import choose, describe_choice
from llm_trainer.planning.comparison import CPU
from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.learning import Learnt, Lesson, find_lesson


def add_other_instances(outline: Outline, manifest: Manifest) -> None:
    """Add the instances that matter for this very job to its manifest, where it ran on GPUs and could be planned.

    Its own speed counts for GPUs like its own. This takes seconds of the processor: call it after the training.
    """
    compared = manifest["planned_and_actual"]
    if not compared or (compared["gpu"] == CPU and compared["instance_type"] not in read_instances().types):
        return
    lesson = find_lesson(manifest)
    learnt = Learnt((lesson,)) if isinstance(lesson, Lesson) else Learnt()
    chosen = choose(list_candidates(replace(outline, learnt=learnt)))
    compared["instances"] = {name: describe_choice(candidate) for name, candidate in chosen.items()}
