# SPDX-License-Identifier: Apache-2.0
"""Tiny image-text models of random weights, trained on texts, exported and merged as a job does it."""

import copy
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.export.logits_check import compute_logits
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.device import find_device
from llm_trainer.model.kinds.text_pass import give_token_types
from llm_trainer.model.kinds.tower import freeze_tower, list_tower
from llm_trainer.model.loading import load_model
from llm_trainer.model.lora_init import BaseReference, save_adapter
from llm_trainer.model.memory.fit import choose_memory_plan
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
from llm_trainer.model.plan import ModelPlan, PlanSettings, plan_model
from llm_trainer.model.precision import choose_precision
from llm_trainer.training.loss_check import check_loss
from llm_trainer.training.methods import choose_method
from llm_trainer.training.packing import choose_packing
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.tiny_architectures import VOCABULARY
from support.tiny_image_models import build_tiny_config, list_image_types
from support.tiny_model import build_tokenizer
from support.trainers import build_run_context, collect_sources

LARGEST_MODEL = 100_000_000  # numbers; what a class does not let itself be shrunk below is left out
CPU = find_device(use_cpu=True)
ROWS = [list(range(3, 15))]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# What Transformers lacks for these: a package that the image does not have, or a class for the type.
UNBUILDABLE = {ImportError: r"requires the (\w+) library", ValueError: "Unrecognized configuration class"}


PAGE = Path(__file__).parents[2] / "docs/vision-models.md"
HEADER = "| type | rows of text |\n|---|---|\n"  # of the page's last table


@dataclass(frozen=True)
class Outcome:
    """What becomes of a type: `trains` or the reason why it does not, and whether rows share sequences."""

    reason: str
    packs: bool | None = None

    def __str__(self) -> str:
        return f"trained; rows {'share sequences' if self.packs else 'are padded'}" if self.trains else self.reason

    @property
    def trains(self) -> bool:
        """True for a type that trains and whose result is proven."""
        return self.reason == "trains"


def try_type(model_type: str, folder: Path) -> Outcome:
    """Train, export and merge a tiny model of a type in a folder. Raise AssertionError where a result differs."""
    try:
        model = write_base(model_type, folder / "base")
    except (ImportError, ValueError) as error:
        found = re.search(UNBUILDABLE[type(error)], str(error))
        assert found, error
        return Outcome(
            f"refused: its parts need {found[1]}" if found.groups() else "refused: Transformers has no class"
        )
    settings = Settings(max_steps=2, per_device_train_batch_size=2, max_length=32, use_cpu=True)
    precision = choose_precision(settings.model, settings.adapter, CPU)
    sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
    try:
        plan = plan_model(str(folder / "base"), sections, CPU, precision)
        trainer, packs = build(plan, settings, folder)
    except UserError as error:
        return Outcome(shorten(str(error)))
    trained = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    trainer.train_from(None)
    unmoved = [name for name in trained if torch.equal(trained[name], trainer.model.get_parameter(name))]
    # An expert that no token goes to stays, and an indexer only chooses tokens.
    assert not [name for name in unmoved if ".experts." not in name and ".indexer." not in name]
    expected = compute_logits(trainer.model, ROWS, CPU.torch)
    check_adapter(trainer.model, plan, settings, folder, expected)
    check_merged(model, plan, settings, folder, expected)
    return Outcome("trains", packs)


def write_base(model_type: str, folder: Path) -> PreTrainedModel:
    """Write a tiny model of random weights with the tests' tokenizer, and return it. Weights of zeros are filled."""
    config = build_tiny_config(model_type)
    with torch.device("meta"):
        assert AutoModelForImageTextToText.from_config(copy.deepcopy(config)).num_parameters() < LARGEST_MODEL
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def build(plan: ModelPlan, settings: Settings, folder: Path) -> tuple[ResumableMixin, bool]:
    """Return a trainer of a few rows, as a job builds it, and whether rows share sequences."""
    parts = (settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)
    scenario = MemoryScenario(plan.config, MemorySettings(*parts), 16, Target(CPU, 1, 2**40), plan.attention.name)
    base = load_model(plan.folder, settings.model, plan.load_options, CPU.torch)
    freeze_tower(base)
    give_token_types(base, plan.token_types)
    method, memory = choose_method(), choose_memory_plan(scenario)
    arguments = build_arguments(method, collect_sources(settings, folder), CPU.torch, plan.precision.compute, memory)
    packing = choose_packing(base, build_tokenizer(), arguments, settings.data, None)
    rows = [{name: list(range(5 + n, 17 + n)) for name in ("input_ids", "labels")} for n in range(8)]
    splits = {"train": Dataset.from_list(rows)}
    model = (base, build_tokenizer(), arguments, splits, packing.collator, plan.lora)
    trainer = build_trainer(method, TrainerParts(*model), build_run_context(), patience=None)
    check_loss(trainer.model, VOCABULARY, CPU.torch, plan.precision.compute)
    return trainer, packing.collator is not None


def check_adapter(
    model: PeftModel, plan: ModelPlan, settings: Settings, folder: Path, expected: list[torch.Tensor]
) -> None:
    """Save the adapter, and assert that it computes the same on a base that is loaded anew."""
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", BaseReference(str(folder / "base"), None), None)
    base = load_model(plan.folder, settings.model, plan.load_options, CPU.torch)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(compute_logits(adapted, ROWS, CPU.torch), expected, **CLOSE)


def check_merged(
    model: PreTrainedModel, plan: ModelPlan, settings: Settings, folder: Path, expected: list[torch.Tensor]
) -> None:
    """Merge the adapter, and assert that the result is of the base's class, has its tower, and computes the same."""
    request = MergeRequest(folder / "base", folder / "adapter", plan.config, plan.precision.compute)
    write_merged_model(request, folder / "merged")
    merged = load_model(str(folder / "merged"), settings.model, plan.load_options, CPU.torch)
    torch.testing.assert_close(compute_logits(merged, ROWS, CPU.torch), expected, **CLOSE)
    assert type(merged) is type(model)
    assert all(torch.equal(merged.get_parameter(name), model.get_parameter(name)) for name in list_tower(model))


def shorten(problem: str) -> str:
    """Return a refusal without names, numbers and advice."""
    told = re.sub(r" ?\(.*\)| of /\S+", "", problem.partition("\n")[0])
    if told.startswith("TRL's loss"):
        return "refused: its class computes logits in a way that TRL's loss does not know"
    if "by other names" in told:
        return "refused: PEFT would read the weights of its adapter by other names than it writes"
    told = re.sub(r"^model_id='\S+' is a \w+, which |^The model ", "it ", told)
    return "refused: " + re.sub(r": (give|it is).*$", "", told)


def read_table() -> dict[str, str]:
    """Return the outcome of each type, as the page on models that see has it."""
    lines = PAGE.read_text(encoding="utf-8").partition(HEADER)[2].strip().splitlines()
    return dict(re.fullmatch(r"\| `(.+)` \| (.+) \|", line).groups() for line in lines)  # type: ignore[union-attr]


def write_table(model_types: list[str]) -> None:
    """Write the outcomes of these types into the page, beside those that are there."""
    table = {name: outcome for name, outcome in read_table().items() if name in list_image_types()}
    for name in model_types:
        with tempfile.TemporaryDirectory() as folder:
            table[name] = str(try_type(name, Path(folder)))
    rows = "".join(f"| `{name}` | {outcome} |\n" for name, outcome in sorted(table.items()))
    PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(HEADER)[0] + HEADER + rows, encoding="utf-8")


if __name__ == "__main__":
    write_table(sys.argv[1:] or list_image_types())
