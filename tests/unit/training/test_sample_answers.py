# SPDX-License-Identifier: Apache-2.0
"""Answers before and after the training: whose they are, that they leave no trace, and that they stop nothing."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig

from llm_trainer.data.datasets import Data
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.images.collator import ImageCollator
from llm_trainer.journal.journal import Journal
from llm_trainer.journal.timeline import Timeline
from llm_trainer.readers.images import ImageRules
from llm_trainer.training import sample_answers
from llm_trainer.training.methods.sft import ResumableSFTTrainer
from llm_trainer.training.sample_answers import (
    MAX_IMAGE_PROMPT_TOKENS,
    AnswerRules,
    SampleAnswers,
    choose_prompts,
    find_longest_prompt,
    split_batches,
)
from support.image_rows import CONVERSATIONS, ROWS, build_vocabulary, prepare_rows, save_pictures
from support.tiny_processors import KINDS, draw, read_template
from support.tiny_vision_models import build_vision_model
from support.trainers import build_full_trainer, build_run_context

RULES = ImageRules(10**7)
PROMPTS = ["one", "two", "three", "four"]


def row_of(tokenizer, prompt: str, answer: str) -> dict[str, list[int]]:
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": head + tail, "labels": [IGNORED] * len(head) + tail}


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """Makes a trainer of a few steps and the job's generations."""

    def build(number=2, lora=True, validation=True, sharded=False, run=None, **arguments):
        rows = Dataset.from_list([row_of(tokenizer, prompt, "yes") for prompt in PROMPTS])
        trainer = ResumableSFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=SFTConfig(
                output_dir=str(tmp_path),
                report_to="none",
                use_cpu=True,
                max_steps=60,
                learning_rate=0.05,
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                **arguments,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
            run=build_run_context(**(run or {})),
        )
        trainer.is_fsdp_enabled = sharded
        splits = {"train": rows, **({"validation": rows.select([2, 3, 3])} if validation else {})}
        timeline = Timeline(0.0, Journal(tmp_path / "metrics.jsonl"), "algo-1")
        return trainer, SampleAnswers(trainer, Data(splits, rows, {}), tokenizer, AnswerRules(number, None), timeline)

    return build


def read(tmp_path, kind):
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def states(trainer):
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "trained": [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad],
        "training": [name for name, module in trainer.model.named_modules() if module.training],
        "use_cache": trainer.model.config.use_cache,
        "generation_config": trainer.model.generation_config.to_dict(),
        "random": torch.get_rng_state(),
    }


def same(one, other):
    assert one.keys() == other.keys()
    return all(
        torch.equal(one[key], other[key])
        if isinstance(one[key], torch.Tensor)
        else same(one[key], other[key])
        if isinstance(one[key], dict)
        else one[key] == other[key]
        for key in one
    )


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_before_is_the_base_and_after_what_was_trained(make, tiny_model, tokenizer, tmp_path, lora):
    trainer, asked = make(lora=lora, gradient_checkpointing=True)
    asked.before_training()
    trainer.train()
    asked.after_training()
    answers = read(tmp_path, "generation")
    assert [answer["prompt"] for answer in answers] == ["three", "four"]
    assert [answer["split"] for answer in answers] == ["validation"] * 2
    assert [answer["reference"] for answer in answers] == ["yes"] * 2
    assert [answer["after"] for answer in answers] == ["yes"] * 2
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer("three")["input_ids"]])
    expected = base.generate(input_ids=ids, do_sample=False, max_new_tokens=64, pad_token_id=0)[0, ids.shape[1] :]
    assert answers[0]["before"].removesuffix("…") == tokenizer.decode(expected, skip_special_tokens=True)
    phases = [record["name"] for record in read(tmp_path, "phase")]
    assert phases == (["answers"] if lora else ["answers_before", "answers"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_asking_changes_nothing(make, lora):
    trainer, asked = make(lora=lora, gradient_checkpointing=True)
    trainer.model.train()
    earlier = states(trainer)
    asked.before_training()
    asked.after_training()
    assert same(earlier, states(trainer))


@pytest.mark.parametrize("run", [{"adapter_start": Path("start")}, {"goes_on": True}], ids=str)
def test_an_adapter_that_begins_elsewhere_than_at_the_base_is_asked_before(make, run):
    _, asked = make(run=run)
    asked.before_training()
    assert len(asked.before) == 2


def test_without_validation_data_the_prompts_are_training_rows(make, tmp_path):
    _, asked = make(validation=False, number=3)
    asked.after_training()
    answers = read(tmp_path, "generation")
    assert [(answer["split"], answer["prompt"]) for answer in answers] == [("train", name) for name in PROMPTS[:3]]


@pytest.mark.parametrize("change", ["none asked for", "another rank", "sharded"])
def test_who_does_not_ask(make, tmp_path, monkeypatch, change):
    if change == "another rank":
        monkeypatch.setenv("RANK", "1")
    _, asked = make(number=0 if change == "none asked for" else 2, sharded=change == "sharded")
    asked.before_training()
    asked.after_training()
    kinds = ["event"] if change == "sharded" else []
    file = tmp_path / "metrics.jsonl"
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()] == kinds if file.exists() else not kinds


def test_a_model_that_cannot_generate_is_told_once(make, tmp_path, capsys, monkeypatch):
    trainer, asked = make()

    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(trainer.model, "generate", fail)
    asked.after_training()
    (event,) = read(tmp_path, "event")
    assert (event["level"], event["text"].split(": ")[-1]) == ("warning", "no kernel image")
    assert capsys.readouterr().out.count("Warning: no sample answers") == 1
    assert read(tmp_path, "generation") == []
    assert trainer.model.get_model_status().enabled is True


def test_when_the_time_is_up_the_rest_is_left_out(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_answers, "MAX_SECONDS", 1e-9)
    _, asked = make()
    asked.after_training()
    assert read(tmp_path, "generation") == []


def test_no_answer_goes_beyond_the_positions_of_the_model():
    """On a GPU, an index beyond a table ends the process."""
    config = {"vocab_size": 300, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with torch.device("meta"):
        models = [GPT2LMHeadModel(GPT2Config(n_positions=length, **config)) for length in (128, 2048)]
    assert [find_longest_prompt(model) for model in models] == [64, 1024]
    row = {"input_ids": [7] * 100, "labels": [IGNORED] * 70 + [7] * 30}
    assert choose_prompts(Dataset.from_list([row]), 1, 64, 64) == []
    assert len(choose_prompts(Dataset.from_list([row]), 1, 1024, 1024)) == 1


def test_prompts_end_where_the_loss_begins(tokenizer):
    def prompts(*rows, number=9):
        return [
            (prompt.input_ids, prompt.reference_ids)
            for prompt in choose_prompts(Dataset.from_list(rows), number, 1024, 1024)
        ]

    two_turns = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORED, IGNORED, 3, 4, IGNORED, 6]}
    assert prompts(two_turns) == [([1, 2], [3, 4])]
    text = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    assert prompts(text) == [([1, 2], [3, 4])]
    assert prompts(two_turns, text, two_turns) == [([1, 2], [3, 4])]  # the same prompt again
    long = {"input_ids": [7] * 2000, "labels": [IGNORED] * 1990 + [7] * 10}
    untrained = {"input_ids": [7] * 3, "labels": [IGNORED] * 3}
    assert prompts(long, untrained, {"input_ids": [7], "labels": [7]}, two_turns) == [([1, 2], [3, 4])]
    other = {**two_turns, "input_ids": [0, 2, 3, 4, 5, 6]}
    assert len(prompts(two_turns, other, number=1)) == 1


@pytest.fixture(params=KINDS)
def seeing(request, tmp_path):
    """A model that sees, its vocabulary, rows with images and without, and answers to all of them."""
    save_pictures(tmp_path)
    vocabulary = build_vocabulary(request.param, tmp_path)
    rows, _ = prepare_rows(vocabulary, ROWS, tmp_path)
    collator = ImageCollator(vocabulary.images, RULES, vocabulary.tokenizer.pad_token_id)
    model = build_vision_model(request.param, vocabulary.images.processor)
    trainer = build_full_trainer(model, vocabulary.tokenizer, rows, collator, tmp_path, max_steps=1)
    timeline = Timeline(0.0, Journal(tmp_path / "metrics.jsonl"), "algo-1")
    data = Data({"train": rows}, rows, {}, vocabulary.images)
    answers = SampleAnswers(trainer, data, vocabulary.tokenizer, AnswerRules(9, collator), timeline)
    return request.param, model, vocabulary, answers


def test_answers_to_images_are_those_to_what_the_processor_makes_of_the_question(seeing, tmp_path):
    kind, model, vocabulary, asked = seeing
    asked.before_training()
    asked.after_training()
    records = read(tmp_path, "generation")
    questions = [CONVERSATIONS[0][:1], CONVERSATIONS[1][:1], CONVERSATIONS[2][:1]]
    for record, question in zip(records, questions, strict=True):
        inputs = vocabulary.images.processor.apply_chat_template(
            question,
            chat_template=read_template(kind),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        assert inputs["input_ids"].tolist() == [asked.prompts[records.index(record)].input_ids]
        made = model.generate(**inputs, do_sample=False, max_new_tokens=64, eos_token_id=sorted(asked.stops))
        assert record["after"] == asked.decode(made[0, inputs["input_ids"].shape[1] :].tolist())
    assert [[image["name"] for image in record["images"]] for record in records] == [
        ["0.png"],
        [],
        ["bytes of the row", "2.png"],
    ]
    assert "[image 1: 0.png, 100 x 60 pixels, " in records[0]["prompt"]
    assert vocabulary.images.processor.image_token not in records[0]["prompt"]


def test_thumbnails_of_prompts_are_bounded_in_number(seeing, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_answers, "MAX_A_JOB", 2)
    *_, asked = seeing
    asked.before_training()
    asked.after_training()
    images = [image for record in read(tmp_path, "generation") for image in record["images"]]
    assert ["thumbnail" in image for image in images] == [True, True, False]


def test_the_same_question_to_two_images_of_one_size_makes_two_prompts():
    place = {"path": "", "offset": 0, "size": 0, "name": "", "start": 1, "tokens": 2}
    row = {"input_ids": [1, 2, 2, 4, 5], "labels": [IGNORED] * 4 + [5]}
    rows = Dataset.from_list([{**row, "pictures": [{**place, "data": data}]} for data in (b"a", b"b", b"a")])
    prompts = choose_prompts(rows, 9, 1024, MAX_IMAGE_PROMPT_TOKENS)
    assert [prompt.pictures[0]["data"] for prompt in prompts] == [b"a", b"b"]
    assert [len(batch) for batch in split_batches(prompts)] == [1, 1]
    assert choose_prompts(rows, 9, 1024, 3) == []


def test_a_prompt_has_all_images_of_its_row():
    place = {"path": "", "offset": 0, "size": 0, "data": b"a", "name": "", "tokens": 80}
    text = {"input_ids": [1] * 100, "labels": [1] * 100}
    within = {**text, "pictures": [{**place, "start": 10}]}
    later = {"input_ids": [1] * 100, "labels": [IGNORED, IGNORED, 1] + [IGNORED] * 97}
    later["pictures"] = [{**place, "start": 5}]
    assert choose_prompts(Dataset.from_list([within, later]), 9, 1024, 1024) == []


def test_an_image_that_has_changed_costs_the_answers_alone(seeing, tmp_path):
    *_, asked = seeing
    draw(7, 300).save(tmp_path / "0.png")
    asked.before_training()
    asked.after_training()
    (event,) = read(tmp_path, "event")
    assert event["text"].startswith(
        "no sample answers, since the model cannot generate here: A row has the image 0.png"
    )
    assert read(tmp_path, "generation") == []


def test_a_pair_asks_with_the_images_of_one_side():
    place = {"path": "", "offset": 0, "size": 0, "data": b"a", "name": "", "tokens": 4}
    side = {"input_ids": [1] * 10, "labels": [IGNORED] * 8 + [1] * 2}
    pair = {name: values * 2 for name, values in side.items()} | {"seq_lengths": [10, 10]}
    pair["pictures"] = [{**place, "start": start} for start in (2, 12)]
    (prompt,) = choose_prompts(Dataset.from_list([pair]), 9, 1024, 1024)
    assert (len(prompt.input_ids), len(prompt.reference_ids)) == (8, 2)
    assert [own["start"] for own in prompt.pictures] == [2]
