# SPDX-License-Identifier: Apache-2.0
"""The places that a job reads and writes: model, data, result and checkpoints, checked before the job starts."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError
from llm_trainer.common.files import explain_denied, find_barrier, find_denial
from llm_trainer.common.safetensors_files import (
    SINGLE_FILE,
    WEIGHTS_INDEX,
    check_weights,
    find_unasked_weights,
    is_git_lfs_pointer,
    list_weights,
)
from llm_trainer.config.environment import Environment
from llm_trainer.config.rules.methods import EARLIER_ADAPTER
from llm_trainer.config.schema import Settings, show_value
from llm_trainer.config.secret_references import is_reference
from llm_trainer.config.sections import (
    ADDRESS,
    HUB_ID,
    METRIC_SCHEDULES,
    SECRETS,
    ModelSettings,
    OutputSettings,
    TrainingSettings,
)
from llm_trainer.config.teacher import TEACHER_CHANNEL, derive_teacher, speak_of_teacher
from llm_trainer.config.tracker_choice import find_idle_project
from llm_trainer.host.write_probe import find_temp_problem, find_write_problem
from llm_trainer.job.earlier_adapter import find_adapter, find_base_warnings
from llm_trainer.job.kept_checkpoints import find_checkpoint_problems
from llm_trainer.job.model_archive import find_archive
from llm_trainer.job.model_objects import find_broken_objects
from llm_trainer.job.model_place import MAX_DEPTH, locate_model
from llm_trainer.job.objective import find_objective_problems, find_objective_warnings, read_objective
from llm_trainer.job.output_places import find_overlaps, find_place_problems, find_place_warnings, find_taken_names
from llm_trainer.journal.manifest import find_unreadable_manifests
from llm_trainer.readers.sources import (
    TRAIN_CHANNEL,
    VALIDATION_CHANNEL,
    Source,
    find_train_sources,
    find_unread_files,
    find_unused_channels,
    find_validation_sources,
)
from llm_trainer.rewards.problems import find_problems
from llm_trainer.serving.limits import find_settings_refusals

TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model", "*.tiktoken")
MAX_NAMED_FILES = 5
UNREAD_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".safetensors")  # the last one under another name than the model's
POINTER = "is a Git LFS pointer and not the file itself: run `git lfs pull`, or download the model again."


@dataclass(frozen=True)
class Inputs:
    """The places of a job, resolved from settings and channels."""

    model: str  # a folder, or a Hub id
    train: list[Source]
    validation: list[Source]
    model_dir: Path
    checkpoint_dir: Path
    adapter: str = ""  # the earlier one, a folder or a Hub id; "" for none
    teacher: str = ""  # of distillation, a folder or a Hub id; "" for none


def find_inputs(settings: Settings, environment: Environment, has_mistakes: bool = False) -> tuple[Inputs, list[str]]:
    """Return the job's inputs, and a sentence for every one that is missing or unusable.

    A model in an archive is unpacked, which takes minutes, only where the job has no mistakes so far.
    """
    train, missing = find_train_sources(settings.data, environment)
    validation, missing_too = find_validation_sources(settings.data, environment)
    missing += missing_too
    unpacks = not (missing or has_mistakes)
    model, problems = find_model(settings.model, environment, unpacks=unpacks)
    adapter, adapter_problems = find_adapter(settings.adapter, environment, unpacks)
    theirs = derive_teacher(settings.model, settings.methods, environment.channels)
    teacher, teacher_problems = find_teacher(settings.data.method, theirs, environment, unpacks=unpacks)
    problems += [*adapter_problems, *teacher_problems, *missing]
    problems += check_evaluation(settings.training, has_validation=bool(validation))
    problems += find_objective_problems(
        read_objective(environment), settings.data.method, settings.training, has_validation=bool(validation)
    )
    problems += find_method_problems(settings, environment)
    folders = choose_folders(settings.output, environment)
    inputs = Inputs(model, train, validation, *folders, adapter, teacher)
    problems += find_folder_problems(settings, environment, inputs)
    return inputs, problems


def find_method_problems(settings: Settings, environment: Environment) -> Iterator[str]:
    """Yield what is wrong with rewards, and a sentence where a reward model would go on from the channel's adapter.

    A rule tells of `adapter_path`.
    """
    adapter, methods = settings.adapter, settings.methods
    is_continued = "adapter" in environment.channels and not (adapter.adapter_path or adapter.merge_adapter)
    if settings.data.trains_rewards and is_continued:
        yield f"channel 'adapter' with method=reward: {EARLIER_ADAPTER}"
    if settings.data.generates:
        named = methods.reward_functions, methods.reward_options, methods.reward_weights
        yield from find_problems(*named, environment.channels, columns=None)


def choose_folders(output: OutputSettings, environment: Environment) -> tuple[Path, Path]:
    """Return the folder of the result, and the one of the checkpoints."""
    return Path(output.output_dir or environment.model_dir), Path(output.checkpoint_dir or environment.checkpoint_dir)


def check_result_place(settings: Settings, environment: Environment, inputs: Inputs) -> Iterator[str]:
    """Yield sentences about a folder of the result in which it would meet what the job reads, or others' files."""
    models = {"the folder of the model": inputs.model, "the folder of the teacher": inputs.teacher}
    read = {name: Path(place) for name, place in models.items() if os.path.isdir(place)}
    if settings.training.use_checkpoints:
        read["the folder of the checkpoints"] = inputs.checkpoint_dir
    for name in ("train_dataset_path", "val_dataset_path"):
        path = settings.value(name)
        if path and os.path.exists(path):
            read[name] = Path(path)
    for name, folder in environment.channels.items():
        if TRAIN_CHANNEL.fullmatch(name) or VALIDATION_CHANNEL.fullmatch(name):
            read[f"channel {name!r}"] = folder
    overlaps = list(find_overlaps(inputs.model_dir, read))
    yield from overlaps or find_taken_names(inputs.model_dir, settings.adapter.use_peft, settings.output.merge_weights)


def find_folder_problems(settings: Settings, environment: Environment, inputs: Inputs) -> Iterator[str]:
    """Yield sentences on the folders that a job writes to, and on the checkpoints that it goes on from."""
    problems = list(find_place_problems(settings.output, environment))
    problems = problems or list(check_folders(inputs, environment.output_dir, settings.training.use_checkpoints))
    problems = problems or list(check_result_place(settings, environment, inputs))  # which looks into the folders
    yield from problems
    if not problems:
        is_alone = len(environment.hosts) == 1
        yield from find_checkpoint_problems(settings.training, inputs.checkpoint_dir, is_alone)


def find_model(
    settings: ModelSettings, environment: Environment, needs_tokenizer: bool = True, unpacks: bool = True
) -> tuple[str, list[str]]:
    """Return the model's folder or Hub id, empty if there is none, and a sentence for each thing wrong with it.

    Without `needs_tokenizer`, a folder may lack its tokenizer, as where only the model's config is of interest.
    Without `unpacks`, a model in an archive is left for later, and nothing is said of it.
    """
    place = name_model(settings, environment)
    if place:
        if denied := list(find_denied_parts(place, settings.chat_template_path)):
            return "", denied
        try:
            if not unpacks and find_archive(Path(place)):
                return "", []
            model = locate_model(place)
        except UserError as error:
            return "", list(error.problems)
        return model, list(check_model(model, needs_tokenizer))
    return "", ["model_id is missing: give a Hugging Face model id, or the model's files as channel 'model'."]


def find_teacher(
    method: str, theirs: ModelSettings, environment: Environment, needs_tokenizer: bool = True, unpacks: bool = True
) -> tuple[str, list[str]]:
    """Return the teacher's folder or Hub id, "" for none, and a sentence for each thing wrong with it.

    `theirs` are its settings by the names of a base's, and the other arguments those of `find_model`.
    """
    if method != "distill":
        is_idle = TEACHER_CHANNEL in environment.channels
        text = (
            f"channel '{TEACHER_CHANNEL}' with method={method}: only method=distill has a teacher; "
            "remove the channel, or set method."
        )
        return "", [text] * is_idle
    if theirs.model_id is None:
        return "", [
            "teacher_model_name_or_path is missing with method=distill: give the teacher's Hugging Face id, or its "
            f"files as channel '{TEACHER_CHANNEL}'."
        ]
    place, problems = find_model(theirs, environment, needs_tokenizer, unpacks)
    return place, list(map(speak_of_teacher, problems))


def find_denied_parts(place: str, template: str | None) -> Iterator[str]:
    """Yield a sentence on what this user may not read of a model or an archive of one; the same for its template.

    Weights beside a template are not read.
    """
    yield from find_denial(Path(place), MAX_DEPTH)
    if template:
        given = Path(template)
        files = given.glob("*.j*") if os.path.isdir(given) else ()  # tokenizer_config.json, chat_template.jinja
        yield from explain_denied([file for file in (given, *files) if find_barrier(file)], given)


def name_model(settings: ModelSettings, environment: Environment) -> str:
    """Return the place that the user names for the model: a Hub id, a path, or the channel; "" where there is none."""
    return settings.model_id or str(environment.channels.get("model", ""))


def check_model(model: str, needs_tokenizer: bool = True) -> Iterator[str]:
    """Yield sentences about a model folder that is incomplete, or a name that is neither folder nor Hub id."""
    folder = Path(model)
    if ADDRESS.match(model):
        yield (
            f"model_id={model!r} is an address, and a model is read from a folder: give its S3 prefix as channel "
            "'model', or the Hugging Face id; outside SageMaker mount or copy it, and give the folder."
        )
        return
    if not os.path.isdir(folder):  # unlike Path's, it takes a name that is too long for one that is not there
        if not HUB_ID.fullmatch(model):
            yield (
                f"model_id={model!r} is neither a folder in the container nor a Hugging Face id: "
                "give an id such as 'Qwen/Qwen3-0.6B' or the folder of a channel."
            )
        return
    if unasked := list(find_unasked_weights(folder, f"Model folder {folder}")):
        yield from unasked
        return
    broken = [file for file in folder.glob("*.*") if file.is_symlink() and not os.path.exists(file)]
    for file in broken:
        yield describe_broken_link(file)
    if needs_tokenizer and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        yield f"Model folder {folder} has no tokenizer ({TOKENIZER_FILES[0]}): put the tokenizer beside the weights."
    if not broken:
        yield from find_broken_objects(folder)
        yield from check_config(folder / "config.json")
        yield from check_tokenizer(folder / TOKENIZER_FILES[0])
        yield from check_weights(folder)


def describe_broken_link(file: Path) -> str:
    """Return the sentence on a model's file that is a link to nowhere."""
    return (
        f"Model file {file} is a link to {os.readlink(file)}, which is not there: copy the files themselves "
        "(`cp -rL`, `aws s3 sync --follow-symlinks`)."
    )


def check_config(file: Path) -> Iterator[str]:
    """Yield a sentence where a model's config.json is missing, a pointer, or another program's."""
    if not file.is_file():
        yield f"Model folder {file.parent} has no config.json: give the folder that holds the model's files itself."
    elif is_git_lfs_pointer(file):
        yield f"{file} {POINTER}"
    else:
        try:
            config = read_json(file, is_plain=False)
        except UnreadableTextError:  # told of with the other files
            return
        if not isinstance(config, dict):
            return
        if not config.keys() & {"model_type", "auto_map"}:  # a map to code of its own
            yield f"{file} has no model_type: give the config.json of a Transformers model."
        elif config.get("transformers_weights"):
            yield (
                f"{file} has transformers_weights={config['transformers_weights']!r}, other weights than a merge and a "
                "server read: remove it, and name the weights as other models do."
            )


def check_tokenizer(file: Path) -> Iterator[str]:
    """Yield a sentence where a tokenizer's file is only a pointer to it."""
    if file.is_file() and is_git_lfs_pointer(file):
        yield f"{file} {POINTER}"


def find_missing_weights(model: str) -> Iterator[str]:
    """Yield a sentence where a model folder has no weights at all: only training needs them."""
    folder = Path(model)
    if not model or not os.path.isdir(folder) or list_weights(folder) or (folder / WEIGHTS_INDEX).is_file():
        return
    others = sorted(file.name for file in folder.glob("*") if file.suffix in UNREAD_WEIGHTS)
    found = f" (found {', '.join(others[:3])}, which is not read)" if others else ""
    yield (
        f"Model folder {folder} has no weights{found}: put {SINGLE_FILE} there, or the files of a {WEIGHTS_INDEX} "
        "with it."
    )


def list_missing_weights(inputs: Inputs) -> list[str]:
    """Return a sentence for each of a job's models whose folder has no weights at all."""
    return [*find_missing_weights(inputs.model), *map(speak_of_teacher, find_missing_weights(inputs.teacher))]


def check_evaluation(settings: TrainingSettings, has_validation: bool) -> Iterator[str]:
    """Yield a sentence for each setting that needs validation data where there are none."""
    if has_validation:
        return
    for name, asks in (
        ("early_stopping", settings.early_stopping),
        ("load_best_model_at_end", settings.load_best_model_at_end),
        ("eval_strategy", settings.eval_strategy != "no"),
        ("eval_on_start", settings.eval_on_start),
        ("lr_scheduler_type", settings.lr_scheduler_type in METRIC_SCHEDULES),
        ("save_strategy", settings.save_strategy == "best"),
    ):
        if asks:
            value = settings.value(name)
            yield f"{name}={show_value(value)} needs validation data and there is none: give a channel 'validation'."


def check_folders(inputs: Inputs, output_dir: Path, use_checkpoints: bool) -> Iterator[str]:
    """Yield a sentence for each folder that the job writes to and cannot."""
    yield from check_writable(inputs.model_dir, "output_dir")
    yield from check_writable(output_dir, "output")
    if use_checkpoints:
        yield from check_writable(inputs.checkpoint_dir, "checkpoint_dir")
    if problem := find_temp_problem():
        yield problem


def check_writable(folder: Path, name: str) -> Iterator[str]:
    """Yield a sentence where a folder cannot be made or written: what the job writes would be lost after hours."""
    if problem := find_write_problem(folder):
        yield f"{name}: {problem}"


def find_warnings(settings: Settings, environment: Environment, inputs: Inputs) -> Iterator[str]:
    """Yield sentences about choices that are valid and seldom meant."""
    place = name_model(settings.model, environment)
    if inputs.model and inputs.model != place:
        yield f"the model is read from {inputs.model}, as {place} is no model's folder itself."
    if os.path.isdir(inputs.adapter):
        yield from find_base_warnings(Path(inputs.adapter), inputs.model, settings.model.model_revision)
    for source in (*inputs.train, *inputs.validation):
        if unread := find_unread_files(source):
            more = f" and {len(unread) - MAX_NAMED_FILES} more" if len(unread) > MAX_NAMED_FILES else ""
            yield f"{source.name} holds files that are not read: {', '.join(unread[:MAX_NAMED_FILES])}{more}"
    if unused := find_unused_channels(environment):
        names = "train, train_..., validation or val, model, adapter, teacher, rewards and config"
        yield f"nothing reads channel {', '.join(unused)}: a job reads {names}."
    for name in SECRETS:
        secret = settings.value(name)
        if secret is not None and not is_reference(secret.get_secret_value()):
            yield (
                f"everyone who may describe the job can read {name}: give it in the job's Environment, or the ARN of a "
                "Secrets Manager secret in its place."
            )
    yield from find_objective_warnings(read_objective(environment))
    yield from find_place_warnings(settings.output, settings.tracking, environment)
    yield from find_unreadable_manifests(inputs.model_dir)
    yield from find_idle_project(settings.tracking)
    yield from find_settings_refusals(settings.adapter, settings.output.merge_weights)
    if settings.training.ignore_data_skip:
        yield "ignore_data_skip=true: a resumed run sees rows of this epoch twice and others not at all."
