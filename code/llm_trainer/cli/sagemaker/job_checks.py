# SPDX-License-Identifier: Apache-2.0
"""Options, settings and channels of a submission that contradict each other. SageMaker would start such a job."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llm_trainer.aws.options import JobOptions
from llm_trainer.config.environment import DEFAULT_BASE_DIR

# Settings that name an input, and the channel by which the job would see it.
INPUT_PATHS = {
    "model_id": "model",
    "adapter_path": "adapter",
    "teacher_model_name_or_path": "teacher",
    "train_dataset_path": "train",
    "val_dataset_path": "validation",
    "chat_template_path": "config",
}
SECRET_ARN = re.compile(r"arn:aws[a-z-]*:(secretsmanager|ssm):")


def find_misread(options: JobOptions, local: Collection[str], remote: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each channel that fast_file or sharded name though SageMaker cannot give it so."""
    for option, names in (("fast_file", options.fast_file), ("sharded", options.sharded)):
        for name in names or ():
            if name not in local and name not in remote:
                known = ", ".join([*local, *remote]) or "none"
                yield f"{option} names {name!r}, which is no channel of this job: its channels are {known}."
    for name in options.fast_file or ():
        if not remote.get(name, "/").endswith("/"):
            yield f"fast_file names {name!r}, and {remote[name]} is no folder: end its prefix with a slash."


def find_local_paths(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each input that a setting names by a path of this machine, which the job will not see."""
    for name, channel in INPUT_PATHS.items():
        path = str(settings.get(name) or "")
        if path and not path.startswith(DEFAULT_BASE_DIR) and (path[0] in "/.~" or os.path.exists(path)):
            yield (
                f"{name}={path!r} is on this machine, which the job cannot see: remove it, and give the folder as "
                f"channel {channel}."
            )


def find_unreachable(options: JobOptions, settings: Mapping[str, Any], channels: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each thing that a job without a network would need one for."""
    if not options.network_isolation:
        return
    for name in ("model_id", "teacher_model_name_or_path"):
        channel = INPUT_PATHS[name]
        if settings.get(name) and channel not in channels:
            yield (
                f"network_isolation=true keeps the job from the Hub, which has {name}={settings[name]!r}: give the "
                f"{channel}'s files as channel {channel}."
            )
    if settings.get("push_to_hub"):
        yield "network_isolation=true keeps the job from the Hub: remove push_to_hub, and push what `fetch` brings."
    for name, value in {**settings, **options.environment}.items():
        if isinstance(value, str) and SECRET_ARN.match(value):
            yield f"network_isolation=true keeps the job from the secret that {name} names: remove one of them."
