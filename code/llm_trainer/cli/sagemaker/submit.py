# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer submit`: a training job on SageMaker from a YAML file, checked before anything is uploaded."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from llm_trainer.aws.clients import find_role, open_client
from llm_trainer.aws.image import resolve_image
from llm_trainer.aws.job_tree import lay_out_tree, stand_in
from llm_trainer.aws.options import CHANNEL_NAME, OPTIONS, JobOptions, find_secrets, read_options
from llm_trainer.aws.refusals import explain_refusals
from llm_trainer.aws.submission import (
    DEFAULT_RUN_SECONDS,
    Submission,
    build_request,
    choose_name,
    describe_channel,
    encode_settings,
    find_bucket,
    find_request_problems,
    join_uri,
)
from llm_trainer.aws.uploads import LocalChannel, read_channel, upload_channel
from llm_trainer.cli.folders import take_option
from llm_trainer.cli.sagemaker.job_checks import find_local_paths, find_misread, find_unreachable
from llm_trainer.cli.sagemaker.jobs import ask_aws, tell_stop
from llm_trainer.cli.sagemaker.rehearsal import (
    Budget,
    Place,
    check_tree,
    find_affordable_seconds,
    find_plan_refusals,
    take_budget,
    tell_warnings,
)
from llm_trainer.common import log
from llm_trainer.common.errors import UserError
from llm_trainer.common.units import show_duration
from llm_trainer.config.environment import DATA_DIR, DEFAULT_BASE_DIR, read_environment
from llm_trainer.config.load import JOB_SECTION, list_valid_names, read_yaml, resolve_names, suggest_name
from llm_trainer.job.job import collect_settings, parse_arguments
from llm_trainer.launcher.stop_signal import withhold_stops


@dataclass(frozen=True)
class JobRequest:
    """A job as a user asks for it: options and settings as they were given, and channels by their places."""

    stem: str  # of the job's name
    options: JobOptions
    settings: Mapping[str, Any]
    local: Mapping[str, Path]  # channels of this machine
    remote: Mapping[str, str]  # channels in S3
    budget: Budget

    @property
    def uploads(self) -> str:
        """The S3 prefix of the uploads."""
        return self.options.uploads or join_uri(find_bucket(self.options), "input")


def submit(words: Sequence[str], dry_run: bool) -> int:
    """Start the job that the words describe, or print its request; return the exit code, 1 where it is refused."""
    return ask_aws(lambda: submit_job(words, dry_run))


def submit_job(words: Sequence[str], dry_run: bool) -> int:
    """Check a job and start it, or print its request. Raises UserError with every mistake."""
    with tell_stop("Stopped: nothing was uploaded, and no job was started."):
        request = read_request(words)
        submission, refusals = check_request(request)
        if refusals and not dry_run:
            raise UserError(*refusals)
        channels = [read_channel(name, place, request.uploads) for name, place in request.local.items()]
    submission = replace(submission, channels={**request.remote, **{each.name: each.uri for each in channels}})
    if dry_run:
        print(json.dumps(build_request(submission, *resolve_loosely(submission.options)), indent=2))
        if refusals:
            raise UserError(*refusals)
        return 0
    start_job(submission, channels)
    return 0


def start_job(submission: Submission, channels: Sequence[LocalChannel]) -> None:
    """Upload the channels of this machine and create the training job. Prints what to do next."""
    options = submission.options
    with tell_stop("Stopped: no job was started. The same command goes on with what is not in S3 yet."):
        request = build_request(submission, resolve_image(str(options.image)), find_role(str(options.role)))
        for channel in channels:
            upload_channel(channel, options.output_kms_key)
        client = open_client("sagemaker")
    with withhold_stops():  # nobody would know whether the job was started
        answer = client.create_training_job(**request)
        log.info(f"Started {answer['TrainingJobArn']}", f"llm-trainer watch {submission.name}")


def resolve_loosely(options: JobOptions) -> tuple[str, str]:
    """Return image and role as a request has them; as they were given, with a warning, where AWS does not answer."""
    resolved = []
    for given, resolve in ((str(options.image), resolve_image), (str(options.role), find_role)):
        try:
            with explain_refusals():
                resolved.append(resolve(given))
        except UserError as error:
            log.error(f"Warning: {given} stays as it was given. {error}")
            resolved.append(given)
    return resolved[0], resolved[1]


def read_request(words: Sequence[str]) -> JobRequest:
    """Return what the words and their YAML file ask for. Raises UserError with every mistake in the options."""
    problems: list[str] = []
    budget, words = take_budget(words)
    file, words = take_file(words)
    given = parse_arguments(words)
    folders = find_channels()
    if file and "config" in folders:
        problems.append(f"Both {file} and channel config have settings: leave out one of them.")
    config = folders.get("config")
    in_file = read_yaml(file or (Path(config) if config else None), problems)
    section = in_file.pop(JOB_SECTION, None) or {}
    if not isinstance(section, dict):
        problems.append(f"`{JOB_SECTION}` holds a {type(section).__name__}: write `key: value` lines below it.")
        section = {}
    on_line = {name: value for name, value in given.items() if name in OPTIONS}
    settings = {name: value for name, value in given.items() if name not in OPTIONS}
    problems += find_unknown(settings)
    options = read_options({**section, **on_line}, problems)
    if file:  # a channel config brings them by itself
        settings = {**resolve_names(in_file, "YAML key", problems), **resolve_names(settings, "Option", [])}
    problems += find_secrets(encode_settings(settings), "hyperparameters")  # before anything is written
    local, remote = sort_channels({**folders, **options.channels}, problems)
    problems += find_misread(options, local.keys(), remote)
    if problems:
        raise UserError(*problems)
    return JobRequest(file.stem if file else "llm-trainer", options, settings, local, remote, budget)


def take_file(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the YAML file that the words name, first or by --config, and the other words."""
    if words and not words[0].startswith("-"):
        return Path(words[0]), list(words[1:])
    named, rest = take_option(words, "config")
    return (Path(named) if named else None), rest


def find_unknown(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each name on the command line that is neither a setting nor an option."""
    known = [*list_valid_names(), *OPTIONS]
    for name in settings:
        if name not in known:
            yield f"--{name} is neither a setting nor an option of submit: {suggest_name(name, known)}"


def find_channels() -> dict[str, str]:
    """Return the folders below the one of --data-dir by the channels that they stand for."""
    data_dir = os.environ.get(DATA_DIR)
    if not data_dir:
        return {}
    if not os.path.isdir(data_dir):
        raise UserError(f"--data-dir={data_dir!r} is no folder: name the one that holds a folder for each channel.")
    folders = (folder for folder in sorted(Path(data_dir).iterdir()) if folder.is_dir())
    return {folder.name: str(folder) for folder in folders if not folder.name.startswith(".")}


def sort_channels(places: Mapping[str, str], problems: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the channels of this machine, and those in S3. Places that are not there become problems."""
    problems += [
        f"Channel {name!r} is none for SageMaker: name it by letters, digits, dots, hyphens and underscores."
        for name in places
        if not CHANNEL_NAME.fullmatch(name)
    ]
    remote = {name: place for name, place in places.items() if place.startswith("s3:")}
    local = {name: Path(place).expanduser() for name, place in places.items() if name not in remote}
    for name, place in local.items():
        if not place.exists():
            problems.append(f"channels has {name}={str(place)!r}, which is not there: name a folder or an S3 prefix.")
    return local, remote


def check_request(request: JobRequest) -> tuple[Submission, list[str]]:
    """Return what is to be submitted, and why the job would fail. Raises UserError with every wrong setting."""
    options, hyperparameters = request.options, encode_settings(request.settings)
    place = list_places(options)[0]
    places = {**request.local, **dict.fromkeys(request.remote)}
    inputs = {name: describe_channel(name, options) for name in places}
    with lay_out_tree(hyperparameters, places, inputs, place.kind, place.count) as tree:
        settings, problems = read_given(tree)
        run_seconds = settings.get("max_run_seconds") or DEFAULT_RUN_SECONDS
        # The job has to know it, too: it saves before SageMaker ends it.
        hyperparameters.setdefault("max_run_seconds", str(run_seconds))
        submission = Submission(
            options,
            options.name or choose_name(request.stem),
            hyperparameters,
            {**request.remote, **dict.fromkeys(request.local, request.uploads)},
            run_seconds,
            uses_checkpoints=settings.get("use_checkpoints", True),
            mlflow={name: settings.get(name) for name in ("mlflow_uri", "mlflow_experiment_name", "run_name")},
        )
        problems += find_request_problems(submission)
        problems += find_secrets({name: settings[name] for name in settings.keys() - hyperparameters}, "uploads")
        problems += find_local_paths(settings)
        problems += find_unreachable(options, settings, places)
        if problems:
            raise UserError(*problems)
        if options.spot and not submission.uses_checkpoints:
            log.error("Warning: spot=true with use_checkpoints=false: a job that is interrupted begins anew.")
        refusals, seconds = rehearse(tree, settings, request)
        return limit_time(submission, seconds), refusals


def limit_time(submission: Submission, seconds: int | None) -> Submission:
    """Return a submission that runs no longer than so many seconds, None for as long as it was given."""
    if seconds is None or seconds >= submission.max_run_seconds:
        return submission
    log.error(f"--max-dollars lasts for {show_duration(seconds)}: max_run_seconds={seconds} stops the job then.")
    hyperparameters = {**submission.hyperparameters, "max_run_seconds": str(seconds)}
    return replace(submission, max_run_seconds=seconds, hyperparameters=hyperparameters)


def read_given(tree: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a job of this tree is given, secrets as they are, and a sentence for each mistake."""
    with stand_in(tree):
        settings, problems = collect_settings(read_environment(), [])
    given = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in settings.given.items()
    }
    return given, [text.replace(str(tree), DEFAULT_BASE_DIR) for text in problems]


def rehearse(tree: Path, settings: Mapping[str, Any], request: JobRequest) -> tuple[list[str], int | None]:
    """Return what `validate` and `plan` find wrong with the job of the tree, and the seconds that its budget lasts.

    Only parts that are readable here are checked. The seconds are None without a budget.
    """
    has_channel = "train" in {*request.local, *request.remote}
    if not has_channel and not settings.get("train_dataset_path"):
        return ["The job has no training data: give channel train, as a folder of this machine or an S3 prefix."], None
    budget, places = request.budget, list_places(request.options)
    if reason := find_unreadable_model(settings, request):
        log.error(f"Not checked from here: model, data and memory, since {reason}. The job checks them first.")
        unknown = (
            f"--max-dollars cannot be kept, since {reason}, and the cost is unknown: give a folder of this machine."
        )
        return ([] if budget.max_dollars is None else [unknown]), None
    if request.remote:
        log.error(f"Not checked from here: what S3 holds for {', '.join(request.remote)}. The job checks it first.")
    commands = ("plan",) if request.remote else ("validate", "plan")
    found = check_tree(tree, commands, places, budget.plan_words)
    planned, problems = found["plan"], []
    if "validate" in found:
        tell_warnings(found["validate"])
        problems = found["validate"]["problems"]
    refusals = [*problems, *find_plan_refusals(planned, places, budget)]
    return refusals, find_affordable_seconds(planned, places, budget)


def list_places(options: JobOptions) -> list[Place]:
    """Return the instances that the job may run on, the first preference first."""
    kinds = options.instance_preferences or {str(options.instance_type): options.instance_count}
    return [Place(kind, count, options.keep_alive_seconds or 0) for kind, count in kinds.items()]


def find_unreadable_model(settings: Mapping[str, Any], request: JobRequest) -> str | None:
    """Return why the job's model cannot be read from here though the job may be able to, else None."""
    if "model" in request.remote:
        return "the model is in S3"
    if "model" in request.local or not settings.get("model_id"):
        return None
    from llm_trainer.common.hub import find_barrier

    has_token = bool(settings.get("token")) or "HF_TOKEN" in request.options.environment
    return find_barrier(settings["model_id"], has_token)
