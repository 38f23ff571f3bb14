# SPDX-License-Identifier: Apache-2.0
"""Publication of the finished artefacts: a push to the Hugging Face Hub, a version in MLflow's registry.

Rank 0 alone calls this once the artefacts lie in the model folder: a failure here loses nothing. The job fails all the
same, since the user asked for the push. The Trainer's own pushing is not used.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from llm_trainer.common import hub, log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.config.secret_references import HUB_TOKEN
from llm_trainer.config.sections import OutputSettings, TrackingSettings
from llm_trainer.config.tracker_choice import choose_trackers
from llm_trainer.export.base_source import BaseSource
from llm_trainer.journal.manifest import MANIFEST, list_whole_result
from llm_trainer.trackers.run_identity import MODEL_PATH, find_left_run, log_files

LARGE_BYTES = 10**9
# `gzip` at its default level took 20.7 s of a core for 200 MB of normally distributed bfloat16 weights, and made them a
# fifth smaller. What SageMaker packs with is not documented.
GZIP_BYTES_A_SECOND = 10e6
RUN_PATIENCE_SECONDS = 10.0
MLFLOW_ERROR = "the artefacts are in {model_dir}: register them by hand, or mend this and start the job again."


@dataclass(frozen=True)
class Artefacts:
    """A finished result, and what MLflow has to know to load it."""

    model_dir: Path
    architecture: str  # the model's class in Transformers
    base: BaseSource
    files: list[str]  # by their paths in the model folder
    tokenizer: list[str]  # those of the tokenizer


def collect_artefacts(model_dir: Path, architecture: str, base: BaseSource, tokenizer: list[Path]) -> Artefacts:
    """Return a finished result: what its manifests list, and nothing that others put in the folder.

    `tokenizer` are the files and folders there that a tokenizer may consist of.
    """
    files = sorted(name for name in list_whole_result(model_dir) if not (model_dir / name).is_symlink())
    parts = {path.name for path in tokenizer}
    of_tokenizer = [name for name in files if PurePosixPath(name).parts[0] in parts]
    return Artefacts(model_dir, architecture, base, files, of_tokenizer)


def publish(settings: OutputSettings, tracking: TrackingSettings, artefacts: Artefacts) -> None:
    """Push and register the artefacts, as far as the settings ask for it.

    Raises UserError with everything that failed; the artefacts are left alone.
    """
    problems: list[str] = []
    if not artefacts.files:
        model_dir = artefacts.model_dir
        raise UserError(f"{model_dir} has no {MANIFEST} that lists the result: push or register its files by hand.")
    if settings.push_to_hub:
        try:
            log.info(f"Pushed to {push_to_hub(settings, artefacts)}")
        except UserError as error:
            problems += error.problems
    if settings.mlflow_register_model:
        try:
            version = register_in_mlflow(settings.mlflow_register_model, tracking, artefacts)
            log.info(f"Registered in MLflow as version {version} of {settings.mlflow_register_model}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)


def advise_compression(model_dir: Path) -> str | None:
    """Return a sentence on packing where the artefacts are so large that it costs minutes; else None."""
    size = sum(file.stat().st_size for file in model_dir.rglob("*") if file.is_file())
    if size < LARGE_BYTES:
        return None
    minutes = size / GZIP_BYTES_A_SECOND / 60
    return (
        f"The artefacts are {size / 1e9:.1f} GB: packing them into model.tar.gz may take {minutes:.0f} billed minutes "
        f"(gzip at {GZIP_BYTES_A_SECOND / 1e6:.0f} MB/s); OutputDataConfig's CompressionType NONE uploads them as they "
        "are, and endpoints start faster from that."
    )


def prepare_push(settings: OutputSettings) -> None:
    """Create the repository and the branch before the training. Raises UserError where no push is possible."""
    if not settings.push_to_hub:
        return
    api, name = connect_to_hub(), settings.hub_model_id

    def prepare() -> None:
        account = api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"hub_model_id={name!r}: the given token may only read: give one that may write.")
        # An existing repository answers too, even one that the account may only read.
        repository = api.create_repo(name, private=settings.hub_private_repo, exist_ok=True).repo_id
        if settings.hub_revision:
            api.create_branch(repository, branch=settings.hub_revision, exist_ok=True)

    hub.retry_while_busy(prepare, f"Preparing {name}", lambda error: f"{refuse_push(settings, error)}.")


def push_to_hub(settings: OutputSettings, artefacts: Artefacts) -> str:
    """Upload the artefacts in one commit. Return its address. Raises UserError where the Hub refuses or stays away."""
    api, model_dir = connect_to_hub(), artefacts.model_dir

    def upload() -> str:
        name = settings.hub_model_id
        repository = name if "/" in name else f"{api.whoami()['name']}/{name}"
        # Not upload_folder, which makes several commits of a large folder: a reader could find half a model.
        additions = [CommitOperationAdd(file, model_dir / file) for file in artefacts.files]
        message = "Result of sagemaker-llm-trainer"
        try:
            return str(api.create_commit(repository, additions, commit_message=message, revision=settings.hub_revision))
        except RuntimeError as error:  # huggingface_hub hides behind one what the Hub answered to an upload
            raise hub.find_answer(error) from error

    def refuse(error: BaseException) -> str:
        return f"{refuse_push(settings, error)}; the artefacts are in {model_dir}: push them by hand."

    return hub.retry_while_busy(upload, f"Pushing to {settings.hub_model_id}", refuse)


def connect_to_hub() -> HfApi:
    """Return a client of the Hub with the token of the push, else the job's."""
    return HfApi(token=os.environ.get(HUB_TOKEN))


def refuse_push(settings: OutputSettings, error: BaseException) -> str:
    """Return why the repository cannot be made or written, and what to change, without the full stop."""
    what = f"hub_model_id={settings.hub_model_id!r}"
    answer = hub.find_answer(error)
    status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else None
    if status == 401:
        return f"{what} cannot be pushed to: the Hub does not know the token; give a valid one as HF_TOKEN"
    if status in (403, 404):
        return f"{what} cannot be pushed to ({status}): give a token that may write there, or a name of your own"
    if status == 409:
        return f"{what} cannot be pushed to (409): something else is there, or writes to it; give another name"
    return f"{what} could not be pushed to ({quote_error(answer)})"


def register_in_mlflow(name: str, tracking: TrackingSettings, artefacts: Artefacts) -> str:
    """Log the artefacts to the job's run as an MLflow model, and register them. Return the version.

    Nothing is loaded into memory or copied, as `mlflow.transformers.log_model` would do. The files go to the run as
    they are, as in MLflow 2: servers of MLflow 2 and 3 take them. Raises UserError where MLflow refuses.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    model_dir = artefacts.model_dir
    try:
        # Without the job's run, whose server may have been away until now, the model has one of its own.
        run_id = find_run(tracking) or mlflow.start_run(run_name=tracking.run_name).info.run_id
        client = mlflow.MlflowClient()
        model = Model(artifact_path=MODEL_PATH, run_id=run_id)
        model.add_flavor("transformers", **describe_flavor(artefacts))
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/MLmodel")
            client.log_artifact(run_id, f"{folder}/MLmodel", MODEL_PATH)
        log_files(client, run_id, model_dir, artefacts.files, MODEL_PATH)
        log_files(client, run_id, model_dir, artefacts.tokenizer, f"{MODEL_PATH}/components/tokenizer")
        version = mlflow.register_model(f"runs:/{run_id}/{MODEL_PATH}", name).version
        if mlflow.active_run():
            mlflow.end_run()
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        fix = MLFLOW_ERROR.format(model_dir=model_dir)
        raise UserError(f"mlflow_register_model={name!r} failed ({quote_error(error)}); {fix}") from error
    return str(version)


def find_run(tracking: TrackingSettings) -> str | None:
    """Return the id of the run that the reporter made for this job; None without one."""
    if "mlflow" not in choose_trackers(tracking):
        return None
    return find_left_run(Path(os.environ["LLM_TRAINER_SCRATCH"]), RUN_PATIENCE_SECONDS)


def describe_flavor(artefacts: Artefacts) -> dict[str, Any]:
    """Return how `mlflow.transformers.load_model` reads the artefacts, in the names of its file format."""
    import transformers

    flavor = {
        "transformers_version": transformers.__version__,
        "code": None,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": artefacts.architecture,
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
    }
    adapter, base = artefacts.model_dir / "adapter_config.json", artefacts.base
    if not adapter.is_file():
        return {**flavor, "model_binary": "."}
    if base.hub_id is None:
        folder = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return {**flavor, "peft_adaptor": ".", "local_base_model_path": folder}
    # MLflow loads the base from the Hub only where a revision is named.
    return {
        **flavor,
        "peft_adaptor": ".",
        "source_model_name": base.hub_id,
        "source_model_revision": base.revision or "main",
    }
