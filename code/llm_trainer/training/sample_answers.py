# SPDX-License-Identifier: Apache-2.0
"""The model's answers to a few held-out prompts before and after the training, for people to compare.

Nothing depends on them. No random number is drawn, the time is bounded, and a model that cannot answer stops nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.ranks import rank
from llm_trainer.data.chat_template import find_turn_end
from llm_trainer.data.datasets import Data
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.collator import ImageCollator, find_ref
from llm_trainer.data.images.shown import decode_pieces, list_pictures, replace_images, show_images
from llm_trainer.journal.records import ShownImage
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.positions import count_positions
from llm_trainer.readers.thumbnails import MAX_A_JOB
from llm_trainer.training.resumable import ResumableMixin

MAX_NEW_TOKENS = 64
MAX_PROMPT_TOKENS = 1024
MAX_IMAGE_PROMPT_TOKENS = 4096  # of a prompt with images, which is alone in its batch
MAX_ROWS = 1000  # the rows among which prompts are looked for
MAX_TEXT_PROMPT_TOKENS = 64  # the beginning of a row without a prompt that serves as one
BATCH_PROMPTS = 8
# The time of all answers, before and after: a share of the training's, within bounds. One token may exceed it.
SHARE, MIN_SECONDS, MAX_SECONDS = 0.05, 2.0, 20.0
# Raised by models' own code for generating, by kernels, and for images that have changed. Memory that runs out is a
# RuntimeError.
ERRORS = (UserError, RuntimeError, ValueError, TypeError, AttributeError, LookupError)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row before the first that is trained on, and those that follow without a gap."""

    input_ids: list[int]
    reference_ids: list[int]
    pictures: tuple[dict[str, Any], ...] = ()  # as rows have them

    @property
    def identity(self) -> tuple[Any, ...]:
        """The tokens and the images: those of two images of the same size are the same."""
        return tuple(self.input_ids), tuple(map(find_ref, self.pictures))


@dataclass(frozen=True)
class AnswerRules:
    """The number of prompts that are answered, and what makes pixels of their images."""

    num_prompts: int
    images: ImageCollator | None


class SampleAnswers:
    """The prompts of a job, and its model's greedy answers. Only rank 0 has any, and none if it holds a shard.

    The answers before the training are those of the trained model without its adapter. Where the training changes the
    base, or an adapter begins with a part of it or with earlier values, the model is asked before.
    """

    def __init__(
        self,
        trainer: ResumableMixin,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        rules: AnswerRules,
        timeline: Timeline,
    ) -> None:
        """Choose prompts from the validation rows, or from training rows where there are none."""
        self.trainer, self.tokenizer = trainer, tokenizer
        self.timeline, self.journal = timeline, timeline.journal
        self.split = "validation" if "validation" in data.splits else "train"
        self.prompts: list[Prompt] = []
        self.before: list[str] = []
        self.seconds = 0.0
        self.collator = rules.images
        if rules.num_prompts and trainer.is_fsdp_enabled:
            text = "no sample answers, since the model is sharded over the devices"
            self.journal.write("event", level="info", text=text, host=timeline.host)
        elif rules.num_prompts and rank() == 0:
            rows = data.splits["validation"] if self.split == "validation" else data.sample
            limits = find_longest_prompt(trainer.model), find_longest_prompt(trainer.model, MAX_IMAGE_PROMPT_TOKENS)
            self.prompts = choose_prompts(rows, rules.num_prompts, *limits)
        self.stops = self.find_stops() if self.prompts else set()

    def before_training(self) -> None:
        """Ask the model, unless the base's answers can be had after the training, too."""
        run = self.trainer.run
        begins_elsewhere = not isinstance(self.trainer.model, PeftModel) or run.adapter_start or run.goes_on
        if self.prompts and begins_elsewhere:
            self.before = self.ask()
            self.timeline.mark("answers_before")

    def after_training(self) -> None:
        """Ask the trained model, and enter prompts and answers in the journal."""
        if not self.prompts:
            return
        if not self.before and isinstance(self.trainer.model, PeftModel):
            with self.trainer.model.disable_adapter():
                self.before = self.ask()
        answers = zip(self.prompts, self.before, self.ask(), strict=False)
        num_thumbnails = MAX_A_JOB
        for prompt, before, after in answers:
            images = self.show(prompt, num_thumbnails)
            num_thumbnails -= sum("thumbnail" in image for image in images)
            self.journal.write(
                "generation",
                split=self.split,
                prompt=decode_pieces(replace_images(prompt.input_ids, images, str), self.tokenizer),
                reference=self.decode(prompt.reference_ids[:MAX_NEW_TOKENS]) if prompt.reference_ids else "",
                before=before,
                after=after,
                images=images,
            )
        log.info(f"Answers to {self.split} prompts before and after the training: {self.seconds:.1f} s")
        self.timeline.mark("answers")

    def show(self, prompt: Prompt, num_thumbnails: int) -> list[ShownImage]:
        """Return what is told of a prompt's images."""
        return show_images(prompt.pictures, self.collator.rules, num_thumbnails) if self.collator else []

    def ask(self) -> list[str]:
        """Return an answer to each prompt, to fewer where the time is up, to none where the model cannot generate."""
        model, started, answers = self.trainer.model, time.monotonic(), []
        was_training = model.training
        model.eval()
        try:
            with self.trainer.accelerator.autocast():
                for prompts in split_batches(self.prompts):
                    left = self.find_limit() / 2 - (time.monotonic() - started)
                    if left > 0:
                        answers += self.answer(prompts, left)
        except ERRORS as error:
            text = f"no sample answers, since the model cannot generate here: {quote_error(error)}"
            log.warning(text)
            self.journal.write("event", level="warning", text=text, host=self.timeline.host)
            self.prompts, answers = [], []
        model.train(was_training)
        self.seconds += time.monotonic() - started
        return answers

    def find_limit(self) -> float:
        """Return the seconds that all answers may take."""
        trained_seconds = self.timeline.seconds.get("training")
        return MAX_SECONDS if trained_seconds is None else min(max(SHARE * trained_seconds, MIN_SECONDS), MAX_SECONDS)

    def answer(self, prompts: list[Prompt], max_seconds: float) -> list[str]:
        """Return the answers to a batch of prompts."""
        batch = self.build_batch(prompts)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            max_time=max_seconds,
            use_cache=True,  # the model's config has it off for the training
            eos_token_id=sorted(self.stops),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.trainer.model.generate(**batch, generation_config=config)
        return [self.decode(ids) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]

    def build_batch(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model: texts padded at the left, or one prompt with what is made of its images."""
        device = self.trainer.model.device
        if self.collator and prompts[0].pictures:
            (prompt,) = prompts
            made = self.collator([{**vars(prompt), "labels": prompt.input_ids}])
            return {name: value.to(device) for name, value in made.items() if name != "labels"}
        longest = max(len(prompt.input_ids) for prompt in prompts)
        padding = [longest - len(prompt.input_ids) for prompt in prompts]  # at the left: answers follow at the right
        filled = zip(padding, prompts, strict=True)
        ids = [[self.tokenizer.pad_token_id] * slots + prompt.input_ids for slots, prompt in filled]
        mask = [[0] * slots + [1] * (longest - slots) for slots in padding]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def find_stops(self) -> set[int]:
        """Return the tokens that end an answer: the tokenizer's, the model's, and special ones that end a reference."""
        own = self.trainer.model.generation_config.eos_token_id
        ends = {prompt.reference_ids[-1] for prompt in self.prompts if prompt.reference_ids}
        stops = {self.tokenizer.eos_token_id, find_turn_end(self.tokenizer), *(own if isinstance(own, list) else [own])}
        return stops - {None} | ends & set(self.tokenizer.all_special_ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of an answer up to its stop token, or with a mark where it has none."""
        end = next((place for place, token in enumerate(ids) if token in self.stops), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return f"{text}…" if end is None else text


def split_batches(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Yield the prompts in their order, BATCH_PROMPTS at most at once. One with images is alone."""
    for has_images, group in groupby(prompts, lambda prompt: bool(prompt.pictures)):
        own, size = list(group), 1 if has_images else BATCH_PROMPTS
        yield from (own[first : first + size] for first in range(0, len(own), size))


def find_longest_prompt(model: PreTrainedModel, most: int = MAX_PROMPT_TOKENS) -> int:
    """Return the tokens of the longest prompt whose answer stays within the positions that the model has."""
    num_positions = count_positions(model)
    return most if num_positions is None else min(most, num_positions - MAX_NEW_TOKENS)


def choose_prompts(rows: Dataset, num_prompts: int, max_tokens: int, max_image_tokens: int) -> list[Prompt]:
    """Return the first `num_prompts` different prompts that have at most so many tokens."""
    prompts: dict[tuple[Any, ...], Prompt] = {}
    for prompt in find_prompts(rows):
        if len(prompts) == num_prompts:
            break
        if len(prompt.input_ids) <= (max_image_tokens if prompt.pictures else max_tokens):
            prompts.setdefault(prompt.identity, prompt)
    return list(prompts.values())


def find_prompts(rows: Dataset) -> Iterator[Prompt]:
    """Yield the prompts of the first rows."""
    for row in rows.select(range(min(MAX_ROWS, len(rows)))):
        ids, labels = row["input_ids"], row["labels"]
        pictures = list_pictures(row)
        if "content" in row:  # a prompt alone
            yield Prompt(ids, [])
            continue
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        start = trained[0] if trained else 0
        if start <= 1:  # a text that is trained on from its first token, or from the one after BOS
            start = min(len(ids) // 2, MAX_TEXT_PROMPT_TOKENS)
        if any(own["start"] + own["tokens"] > start for own in pictures):
            continue  # a processor may make something else of an image where others are missing
        end = next((place for place in range(start, len(ids)) if labels[place] == IGNORED), len(ids))
        if 0 < start < end:
            yield Prompt(ids[:start], ids[start:end], tuple(pictures))
