# SPDX-License-Identifier: Apache-2.0
"""The model's answers to a few held-out prompts before and after the training, for people to compare.

Nothing depends on them. No random number is drawn, the time is bounded, and a model that cannot answer stops nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_trainer.common import log
from llm_trainer.common.errors import quote_error
from llm_trainer.common.ranks import rank
from llm_trainer.data.chat_template import find_turn_end
from llm_trainer.data.datasets import Data
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.journal.timeline import Timeline
from llm_trainer.model.positions import count_positions
from llm_trainer.training.resumable import ResumableMixin

MAX_NEW_TOKENS = 64
MAX_PROMPT_TOKENS = 1024
MAX_ROWS = 1000  # the rows among which prompts are looked for
MAX_TEXT_PROMPT_TOKENS = 64  # the beginning of a row without a prompt that serves as one
BATCH_PROMPTS = 8
# The time of all answers, before and after: a share of the training's, within bounds. One token may exceed it.
SHARE, MIN_SECONDS, MAX_SECONDS = 0.05, 2.0, 20.0
# Raised by models' own code for generating, and by kernels. Memory that runs out is a RuntimeError.
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row before the first that is trained on, and those that follow without a gap."""

    input_ids: list[int]
    reference_ids: list[int]


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
        num_prompts: int,
        timeline: Timeline,
    ) -> None:
        """Choose at most `num_prompts` prompts from the validation rows, or from training rows where there are none."""
        self.trainer, self.tokenizer = trainer, tokenizer
        self.timeline, self.journal = timeline, timeline.journal
        self.split = "validation" if "validation" in data.splits else "train"
        self.prompts: list[Prompt] = []
        self.before: list[str] = []
        self.seconds = 0.0
        if num_prompts and trainer.is_fsdp_enabled:
            text = "no sample answers, since the model is sharded over the devices"
            self.journal.write("event", level="info", text=text, host=timeline.host)
        elif num_prompts and rank() == 0:
            rows = data.splits["validation"] if self.split == "validation" else data.sample
            self.prompts = choose_prompts(rows, num_prompts, find_longest_prompt(trainer.model))
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
        for prompt, before, after in answers:
            self.journal.write(
                "generation",
                split=self.split,
                prompt=self.tokenizer.decode(prompt.input_ids),
                reference=self.decode(prompt.reference_ids[:MAX_NEW_TOKENS]) if prompt.reference_ids else "",
                before=before,
                after=after,
            )
        log.info(f"Answers to {self.split} prompts before and after the training: {self.seconds:.1f} s")
        self.timeline.mark("answers")

    def ask(self) -> list[str]:
        """Return an answer to each prompt, to fewer where the time is up, to none where the model cannot generate."""
        model, started, answers = self.trainer.model, time.monotonic(), []
        was_training = model.training
        model.eval()
        try:
            with self.trainer.accelerator.autocast():
                for first in range(0, len(self.prompts), BATCH_PROMPTS):
                    left = self.find_limit() / 2 - (time.monotonic() - started)
                    if left > 0:
                        answers += self.answer(self.prompts[first : first + BATCH_PROMPTS], left)
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
        longest = max(len(prompt.input_ids) for prompt in prompts)
        pad, device = self.tokenizer.pad_token_id, self.trainer.model.device
        padding = [longest - len(prompt.input_ids) for prompt in prompts]  # at the left: answers follow at the right
        batch = zip(padding, prompts, strict=True)
        input_ids = torch.tensor([[pad] * slots + prompt.input_ids for slots, prompt in batch], device=device)
        mask = torch.tensor([[0] * slots + [1] * (longest - slots) for slots in padding], device=device)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            max_time=max_seconds,
            use_cache=True,  # the model's config has it off for the training
            eos_token_id=sorted(self.stops),
            pad_token_id=pad,
        )
        output = self.trainer.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        return [self.decode(ids) for ids in output[:, longest:].tolist()]

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


def find_longest_prompt(model: PreTrainedModel) -> int:
    """Return the tokens of the longest prompt whose answer stays within the positions that the model has."""
    num_positions = count_positions(model)
    return MAX_PROMPT_TOKENS if num_positions is None else min(MAX_PROMPT_TOKENS, num_positions - MAX_NEW_TOKENS)


def choose_prompts(rows: Dataset, num_prompts: int, max_tokens: int) -> list[Prompt]:
    """Return the first `num_prompts` different prompts that have at most `max_tokens`."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    for prompt in find_prompts(rows, max_tokens):
        if len(prompts) == num_prompts:
            break
        prompts.setdefault(tuple(prompt.input_ids), prompt)
    return list(prompts.values())


def find_prompts(rows: Dataset, max_tokens: int) -> Iterator[Prompt]:
    """Yield the prompts of the first rows, as far as they have at most `max_tokens`."""
    for row in rows.select(range(min(MAX_ROWS, len(rows)))):
        if row.get("pictures"):
            continue  # their pixels are no part of a prompt yet
        ids, labels = row["input_ids"], row["labels"]
        if "content" in row:  # a prompt alone
            if len(ids) <= max_tokens:
                yield Prompt(ids, [])
            continue
        trained = [place for place, label in enumerate(labels) if label != IGNORED]
        start = trained[0] if trained else 0
        if start <= 1:  # a text that is trained on from its first token, or from the one after BOS
            start = min(len(ids) // 2, MAX_TEXT_PROMPT_TOKENS)
        end = next((place for place in range(start, len(ids)) if labels[place] == IGNORED), len(ids))
        if 0 < start <= max_tokens and start < end:
            yield Prompt(ids[:start], ids[start:end])
