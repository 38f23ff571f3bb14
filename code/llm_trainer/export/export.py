# SPDX-License-Identifier: Apache-2.0
"""The result of a job in /opt/ml/model: an adapter or whole weights, proven, with the files that a server needs.

The weights go in place first, with their config and the tokenizer. Then they are proven there. Nothing that fails after
that, or beside it, takes them away: a result that differs from what was trained is moved to output/data.
"""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from llm_trainer import __version__
from llm_trainer.common import log
from llm_trainer.common.activity_notes import note_activity
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import remove_leftover, remove_path, write_json
from llm_trainer.data.chat_template import find_turn_end
from llm_trainer.export.logits_check import ResultDiffersError, explain_failed_check
from llm_trainer.export.model_card import CARD, write_model_card
from llm_trainer.export.placement import ModelFolder, list_files, move_files
from llm_trainer.export.publish import advise_compression, collect_artefacts, publish
from llm_trainer.export.result import TrainingResult
from llm_trainer.export.verify import prove_merged, prove_trained
from llm_trainer.journal.manifest import ADAPTER, MANIFEST, Manifest, list_whole_result, read_manifest
from llm_trainer.journal.records import SCHEMA_VERSION
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.config_file import add_stop_tokens, write_config, write_generation_config
from llm_trainer.model.kinds.tower import learns_to_see
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.loading import restore_generation_config
from llm_trainer.model.lora import find_base_model
from llm_trainer.model.lora_init import BaseReference, save_adapter
from llm_trainer.model.tokenizer_files import list_tokenizer_files, save_tokenizer
from llm_trainer.serving.lmi_files import SERVING_FILES, ServedImages, ServedModel, write_serving_files

REJECTED = "rejected_export"  # in output/data
UNFINISHED = "the job ended before the comparison did"
STOPPED = "the job was stopped before the comparison"

Written = TypeVar("Written")


@dataclass(frozen=True)
class PlacedResult:
    """A result that is in its place."""

    folder: ModelFolder
    where: str  # its folder in the model folder: "." or ADAPTER
    files: set[str]  # by their paths in its folder

    @property
    def path(self) -> Path:
        """The folder of the result."""
        return self.folder.path / self.where

    @property
    def waiting(self) -> Path:
        """The folder in which a file waits to be put beside the result."""
        return self.folder.new / self.where

    def name_files(self, files: Iterable[str]) -> list[str]:
        """Return the names of files of the result in the model folder."""
        return [(PurePosixPath(self.where) / file).as_posix() for file in files]


def place_result(trained: TrainingResult) -> PlacedResult:
    """Write the trained weights with their config and the tokenizer, and put them in place. Nothing is proven yet.

    Only global rank 0 calls this. The manifest says that the result is unproven, until `finish_result` writes another.
    """
    merges = trained.settings.output.merge_weights
    if merges and trained.watch.is_stopped:
        merges = False  # it may take longer than the platform waits
        trained.watch.leave_out("the merge")
    with note_activity("writing the result", trained.places.model_dir):
        folder = ModelFolder.open(trained.places.model_dir)
        placed = PlacedResult(folder, ADAPTER if merges else ".", set())
        placed.waiting.mkdir(exist_ok=True)
        try:
            save_weights(trained, placed.waiting)
        except BaseException:
            folder.close()  # half the weights are no result, and a full disk needs the room
            raise
        try:
            put_in_place(trained, placed, list_whole_result(folder.path))
        except Exception:
            log.warning(f"What was written of the result is in {folder.new}.")
            raise
    trained.timeline.mark("export")
    return placed


def put_in_place(trained: TrainingResult, placed: PlacedResult, earlier: Iterable[str]) -> None:
    """Put waiting weights in place, with the tokenizer and a first manifest. `earlier` are files that they replace."""
    waiting = placed.waiting
    write_tokenizer(trained, placed.folder.staging / "tokenizer", waiting)
    placed.files.update({MANIFEST, *list_files(waiting)})
    first = Manifest(schema_version=SCHEMA_VERSION, llm_trainer=__version__, export=describe_unproven(UNFINISHED))
    first["files"] = sorted(placed.files | {CARD, *SERVING_FILES})  # those that a kill could leave
    with warn_of_failure(MANIFEST, placed.path):
        write_json(waiting / MANIFEST, first)
    placed.folder.place(placed.name_files(first["files"]), earlier)
    log.info(f"Wrote {', '.join(sorted(placed.files))} to {placed.path}")


def write_tokenizer(trained: TrainingResult, scratch: Path, folder: Path) -> None:
    """Write the tokenizer to a folder: by the base's files, or where that fails as Transformers writes it.

    What comes of the base's files is made in `scratch`: half of them may not mix with others.
    """
    try:
        scratch.mkdir(exist_ok=True)
        save_tokenizer(trained.tokenizer, trained.base_folder, scratch, trained.settings.model)
        move_files(list_files(scratch), scratch, folder)
    except Exception as error:
        log.warning(
            "The tokenizer could not be written by the base's files, and is written as Transformers 5 writes it, which "
            f"Transformers 4 may not read: {type(error).__name__}: {quote_error(error)}."
        )
        trained.tokenizer.save_pretrained(folder)
    finally:
        remove_leftover(scratch)


def finish_result(trained: TrainingResult, placed: PlacedResult, manifest: Manifest) -> None:
    """Describe a result that is in place, prove it, and merge it if that is asked for.

    Raises UserError when the files that were written do not compute what was trained.
    """
    manifest["export"] = describe_unproven(UNFINISHED if trained.logits else trained.unproven or STOPPED)
    refusals = write_serving(trained, placed, manifest) if placed.where == "." else []
    write_records(trained, placed, manifest, refusals)
    if trained.logits is not None:
        manifest["export"] |= prove_or_reject(trained, placed, trained.logits)
        trained.timeline.mark("proof")
        write_records(trained, placed, manifest, refusals)
    placed.folder.forget_earlier()
    try:
        if placed.where == ADAPTER:
            add_merged(trained, placed, manifest)
    finally:
        placed.folder.close()


def publish_result(trained: TrainingResult) -> None:
    """Publish a finished result, as far as the settings ask for it. Raises UserError with everything that failed."""
    model_dir, settings = trained.places.model_dir, trained.settings
    if advice := advise_compression(model_dir):
        log.info(advice)
    if settings.output.push_to_hub or settings.output.mlflow_register_model:
        artefacts = collect_artefacts(model_dir, trained.architecture, trained.base, list_tokenizer_files(model_dir))
        trained.watch.attempt(f"publishing {model_dir}", lambda: publish(settings.output, settings.tracking, artefacts))
        if trained.watch.left_out:
            record_left_out(model_dir, trained.watch.left_out)


def record_left_out(model_dir: Path, left_out: list[str]) -> None:
    """Tell a result's manifests what a stop has left out since they were written. `left_out` are sentences."""
    for folder in (model_dir, model_dir / ADAPTER):
        if (folder / MANIFEST).is_file():
            with warn_of_failure(MANIFEST, folder):
                manifest = read_manifest(folder)
                manifest["stopped"] = True
                manifest["export"]["left_out"] = left_out
                write_json(folder / MANIFEST, manifest)


def save_weights(trained: TrainingResult, folder: Path) -> None:
    """Write the adapter, or all weights, to a folder that exists."""
    model, plan, weights = trained.trainer.model, trained.plan, trained.weights
    if isinstance(model, PeftModel):
        base = BaseReference(trained.base_name, trained.base.revision)
        save_adapter(model, folder, base, trained.trainer.run.adapter_start, weights)
        add_turn_end(trained, folder)
        return
    whole = rebuild_plain_model(model, weights) if weights else model
    whole.to(plan.precision.compute)
    whole.config.use_cache = True  # switched off for training, and a serving container reads it
    if whole.can_generate():
        give_generation_config(whole, trained)
    whole.save_pretrained(folder)
    with warn_of_failure("A config.json for Transformers 4 too", folder):
        write_config(folder, trained.base_folder, whole.config, trained.settings.model.trust_remote_code)
        write_generation_config(folder, trained.base_folder, whole.generation_config)
    add_turn_end(trained, folder)


def give_generation_config(whole: PreTrainedModel, trained: TrainingResult) -> None:
    """Give a model the generation config of its base, or where that cannot be read one that can be written."""
    try:
        restore_generation_config(whole, trained.base_folder)  # the folder may be gone by now
    except Exception as error:
        log.warning(f"The base's generation_config.json could not be read again: {quote_error(error)}.")
        whole.generation_config = GenerationConfig.from_model_config(whole.config)


def add_turn_end(trained: TrainingResult, folder: Path) -> None:
    """Have servers end an answer where the training did: at the tokenizer's EOS, and where the template ends a turn.

    The EOS of many bases, such as <|endoftext|>, is not the token that ends a turn. A reward model answers nothing.
    """
    if is_reward_model(trained.plan.config):
        return
    tokenizer = trained.tokenizer
    ends = [token for token in (tokenizer.eos_token_id, find_turn_end(tokenizer)) if token is not None]
    with warn_of_failure("The tokens that end an answer", folder):
        if added := add_stop_tokens(folder, trained.base_folder, ends):
            names = ", ".join(tokenizer.convert_ids_to_tokens(added))
            log.info(f"generation_config.json: an answer ends at {names} too, which the base's does not name")


def rebuild_plain_model(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return a sharded model as a plain one, made of the same tensors."""
    sharded_class, plain_class = type(model), type(model).__mro__[2]  # `fully_shard` put FSDPModule between them
    assert issubclass(sharded_class, FSDPModule)
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    return plain


def release_memory(trained: TrainingResult) -> None:
    """Free the memory that training took: the written model is loaded next."""
    trainer = trained.trainer
    if trained.weights is not None:
        trained.weights.clear()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    for module in list(trainer.model.modules()):  # emptied, since others still hold the model itself
        module.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prove_or_reject(trained: TrainingResult, placed: PlacedResult, expected: list[torch.Tensor]) -> dict[str, Any]:
    """Free the trained model, and compare what was written with its logits. Return the outcome for the manifest.

    A result that differs goes out of the model folder: it is not lost, and nobody takes it for the model. Raises
    UserError that names its place.
    """

    def prove() -> Iterator[dict[str, Any]]:
        trained_bytes = trained.trainer.model.get_memory_footprint()
        release_memory(trained)
        yield from prove_trained(trained, placed.path, expected, trained_bytes)

    try:
        return attempt_proof(trained, prove)
    except ResultDiffersError as error:
        rejected = reject_result(placed, trained.places.output_dir)
        raise UserError(f"{error} What was written is in {rejected}, and the checkpoints are kept.") from error


def attempt_proof(trained: TrainingResult, prove: Callable[[], Iterable[dict[str, Any]]]) -> dict[str, Any]:
    """Return the checks of a proof, and whether all of them ran.

    A stop, and whatever else ends a check, says nothing against the result, which is unproven then. Raises
    ResultDiffersError where it differs.
    """
    try:
        checks = trained.watch.attempt("the comparison with the trained model", lambda: list(prove()))
    except ResultDiffersError:
        raise
    except Exception as error:  # a kernel that has no CPU code, a base that is gone: any library's
        reason = explain_failed_check("the comparison", error)
        log.warning(f"The result is in place, and not proven: {reason}.")
        return describe_unproven(reason)
    if checks is None:
        return describe_unproven(STOPPED)
    left_out = [check["loaded"] for check in checks if not check["rows"]]
    return {**(describe_unproven(left_out[0]) if left_out else {"proven": True, "reason": None}), "checks": checks}


def describe_unproven(reason: str) -> dict[str, Any]:
    """Return the manifest's record of a result that was not compared with the trained model."""
    return {"proven": False, "reason": reason, "checks": []}


def reject_result(placed: PlacedResult, output_dir: Path) -> Path:
    """Move a result that failed its proof out of the model folder, and an earlier one back. Return its new place.

    Where output/data has no room for it, it stays beside the model, under a name that no server looks for.
    """
    removed = placed.folder.take_back(placed.name_files(placed.files)) / placed.where
    rejected = output_dir / "data" / REJECTED
    try:
        remove_path(rejected)
        move_folder(removed, rejected)
    except OSError:
        shutil.rmtree(rejected, ignore_errors=True)  # a part of a copy
        rejected = placed.folder.path / REJECTED
        remove_path(rejected)
        removed.rename(rejected)
    placed.folder.close()
    return rejected


def move_folder(source: Path, target: Path) -> None:
    """Move a folder, also to another disk. Raises OSError where that fails, with the source whole."""
    try:
        source.rename(target)
    except OSError:
        shutil.copytree(source, target)
        shutil.rmtree(source, ignore_errors=True)  # what is left of it is in the target too


def add_merged(trained: TrainingResult, adapter: PlacedResult, manifest: Manifest) -> None:
    """Merge the adapter shard by shard, prove the merged model, and put it in place beside the adapter.

    Raises UserError that tells where the adapter is.
    """
    merged = PlacedResult(adapter.folder, ".", set())
    merged.waiting.mkdir(exist_ok=True)
    checks = manifest["export"]["checks"]
    try:
        merge = trained.watch.attempt("the merge", lambda: merge_adapter(trained, adapter.path, merged.waiting))
        if merge is None:
            log.info(f"The adapter is in {adapter.path}, and `llm-trainer merge` merges it later.")
            remove_path(merged.waiting)  # half a merge
            write_records(trained, adapter, manifest, [])
            return
        manifest["export"] |= {"merge": merge}
        if trained.logits is not None:
            proof = attempt_proof(trained, lambda: prove_merged(trained, adapter.path, merged.waiting))
            manifest["export"] |= proof | {"checks": [*checks, *proof["checks"]]}
        trained.timeline.mark("merge")
        put_in_place(trained, merged, ())
    except (UserError, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{quote_error(error)}."
        raise UserError(
            f"merge_weights=true: the merge failed, and nothing is lost: the adapter is in {adapter.path}, and "
            f"`llm-trainer merge` merges it later. {reason}"
        ) from error
    write_records(trained, merged, manifest, write_serving(trained, merged, manifest))


def merge_adapter(trained: TrainingResult, adapter: Path, folder: Path) -> dict[str, Any]:
    """Merge an adapter into its base, and return figures for the manifest."""
    plan, settings = trained.plan, trained.settings
    quantization = plan.quantization if settings.output.merge_base == "dequantized" else None
    parts = (trained.base_folder, adapter, plan.config, plan.precision.compute, quantization)
    return write_merged_model(MergeRequest(*parts, settings.model.trust_remote_code), folder)


@contextmanager
def warn_of_failure(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever fails beside the weights into a warning: the result is whole without it."""
    try:
        yield
    except Exception as error:
        log.warning(
            f"{what} could not be written to {folder}, and the weights there are whole without: "
            f"{type(error).__name__}: {quote_error(error)}."
        )


def write_beside(placed: PlacedResult, what: str, write: Callable[[Path], Written]) -> Written | None:
    """Have files written to a folder and put beside the weights. Return what `write` does; None after a failure."""
    with warn_of_failure(what, placed.path):
        try:
            placed.waiting.mkdir(parents=True, exist_ok=True)
            written = write(placed.waiting)
            placed.files.update(list_files(placed.waiting))
            placed.folder.add_files()
            return written
        finally:
            remove_path(placed.folder.new)
    return None


def write_serving(trained: TrainingResult, placed: PlacedResult, manifest: Manifest) -> list[str]:
    """Write the files for a server. Return, and log, why vLLM cannot serve the result."""
    refusals = write_beside(
        placed,
        "The files for AWS's LMI container",
        lambda folder: write_serving_files(folder, describe_served(placed.path, trained, manifest), placed.path),
    )
    if refusals is None:
        return ["The files for AWS's LMI container could not be written."]
    for refusal in refusals:
        log.info(f"Serving: {refusal}")
    return refusals


def write_records(trained: TrainingResult, placed: PlacedResult, manifest: Manifest, refusals: list[str]) -> None:
    """Write the model card and the manifest. `refusals` are sentences on why vLLM does not serve the result."""
    manifest["export"] |= {"served_by_vllm": not refusals, "left_out": trained.watch.left_out}
    manifest["stopped"] |= bool(trained.watch.left_out)

    def write_card(folder: Path) -> None:
        write_model_card(folder, placed.path, manifest, (trained.base_folder, trained.base), refusals)

    write_beside(placed, CARD, write_card)
    manifest["files"] = sorted(placed.files)
    write_beside(placed, MANIFEST, lambda folder: write_json(folder / MANIFEST, manifest))


def describe_served(folder: Path, trained: TrainingResult, manifest: Manifest) -> ServedModel:
    """Return the facts by which the serving files are written."""
    is_adapter = (folder / CONFIG_NAME).is_file()
    return ServedModel(
        config=trained.plan.config,
        num_weights=manifest["parameters"],
        dtype=trained.plan.precision.compute,
        chat_template=trained.tokenizer.chat_template,
        lora=LoraConfig.from_pretrained(str(folder)) if is_adapter else None,
        base_id=trained.base.hub_id,
        base_revision=trained.base.revision,
        max_length=trained.settings.data.max_length,
        trust_remote_code=trained.settings.model.trust_remote_code,
        is_reward=is_reward_model(trained.plan.config),
        has_stop_tokens=(folder / GENERATION_CONFIG_NAME).is_file(),
        images=describe_served_images(manifest, trained.settings.data.max_images_per_row),
        sees=is_adapter and learns_to_see(find_base_model(trained.trainer.model)),
    )


def describe_served_images(manifest: Manifest, given: int | None) -> ServedImages | None:
    """Return how many images a request may have, by those of a row; None where rows are texts alone."""
    most = max((split.get("most_images_a_row", 0) for split in manifest["data"].values()), default=0)
    return ServedImages(most, given) if most else None
