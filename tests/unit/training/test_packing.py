# SPDX-License-Identifier: Apache-2.0
"""Rows that share a sequence are trained as if they were alone, and little of a sequence is padding."""

import copy
import itertools
import random
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.tokenize import FEATURES
from llm_trainer.model.layers.reward_head import describe_rewards
from llm_trainer.training.packing import SPARE_SHARE, Packing, choose_packing, examine_model, plan_batch_bins
from llm_trainer.training.packing_check import find_cross_row_attention
from support.packed_models import BASE, KEEP_APART, LEAK, as_one, build_model, make_rows, stack
from support.tiny_image_models import build_tiny_config
from support.tiny_model import build_tokenizer


def rows_of(batch):
    """Every row of a batch by its place: (sequence, first slot, length)."""
    for number, positions in enumerate(batch["position_ids"].tolist()):
        starts = [slot for slot, position in enumerate(positions) if position == 0] + [len(positions)]
        for start, end in itertools.pairwise(starts):
            yield number, start, end - start


def check_logits(model, batch, rows, model_alone=None):
    """Each row is in the batch, with the logits that it has alone, there by `model_alone` if that is given."""
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    found = {
        tuple(batch["input_ids"][number, start : start + length].tolist()): packed[number, start : start + length]
        for number, start, length in rows_of(batch)
    }
    for row in rows:
        with torch.no_grad():
            alone = (model_alone or model)(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        torch.testing.assert_close(found[tuple(row["input_ids"])], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KEEP_APART)
def test_packed_rows_have_the_logits_that_they_have_alone(name, kernel):
    model = build_model(KEEP_APART[name], kernel)
    rows = make_rows()
    batch = stack()(rows)
    assert len(batch["input_ids"]) < len(rows)
    check_logits(model, batch, rows)
    check_logits(model, stack()([as_one(rows[:3]), as_one(rows[3:])]), rows)
    assert find_cross_row_attention(model, stack(max_length=None)) is None


def test_flex_attention_keeps_packed_rows_apart():
    """By its mask, which is tested uncompiled: the CPU's kernel takes minutes to compile, and the GPU's is another."""
    config, rows = LlamaConfig(**{**BASE, "hidden_size": 256}), make_rows()
    with torch.compiler.set_stance("force_eager"):
        check_logits(build_model(config, "flex_attention"), stack()(rows), rows, model_alone=build_model(config))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_packed_batch_has_the_gradients_of_the_padded_one(kernel):
    model = build_model(KEEP_APART["llama"], kernel)
    rows = make_rows()

    def gradients(batch):
        model.zero_grad()
        labels = batch["labels"]
        loss = model(**batch, use_cache=False, num_items_in_batch=(labels[:, 1:] != IGNORED).sum()).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    packed = stack()(rows)
    del packed["num_tokens"]
    torch.testing.assert_close(gradients(packed), gradients(DataCollatorForLanguageModeling(0)(rows)))


def test_flash_attention_gets_one_sequence_and_where_its_rows_begin():
    batch = stack(flattens=True)(make_rows([5, 3, 4]))
    assert batch["num_tokens"].tolist() == [5, 3, 4]
    assert batch["input_ids"].shape == (1, 12)
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12]
    assert batch["max_length_k"] == 5
    assert [length for _, _, length in rows_of(batch)] == [5, 3, 4]
    assert (batch["labels"][0, [0, 5, 8]] == IGNORED).all()


def test_the_first_tensor_tells_the_examples_and_their_tokens():
    batch = stack()([as_one(make_rows([30, 20])), as_one(make_rows([9]))])
    assert next(iter(batch)) == "num_tokens"
    assert batch["num_tokens"].tolist() == [50, 9]


def test_sequences_are_padded_to_a_multiple():
    batch = stack(pad_to_multiple_of=16)(make_rows([20, 3]))
    assert batch["input_ids"].shape == (1, 32)
    assert batch["labels"][0, 23:].tolist() == [IGNORED] * 9
    assert batch["position_ids"][0, 23:].tolist() == list(range(9))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=24), spare=st.integers(0, 60))
@hypothesis_settings(deadline=None)
def test_rows_are_distributed_over_short_sequences_without_waste(lengths, spare):
    limit = max(lengths) + spare
    sequences = plan_batch_bins(lengths, limit)
    assert sorted(place for places in sequences for place in places) == list(range(len(lengths)))
    fullest = max(sum(lengths[place] for place in places) for places in sequences)
    assert fullest <= limit
    slots = fullest * len(sequences)
    assert slots <= max(lengths) * len(lengths)
    if max(lengths) * len(lengths) <= sum(lengths) * (1 + SPARE_SHARE):
        assert len(sequences) == len(lengths)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), limit=st.none() | st.integers(30, 90))
@hypothesis_settings(deadline=None)
def test_every_row_is_in_the_batch_once_and_whole(lengths, limit):
    rows = make_rows(lengths)
    batch = stack(max_length=limit)(rows)
    assert batch["input_ids"].shape[1] <= (limit or max(lengths))
    found = [batch["input_ids"][number, start : start + length].tolist() for number, start, length in rows_of(batch)]
    trained = [batch["labels"][number, start : start + length].tolist() for number, start, length in rows_of(batch)]
    real = [(ids, labels) for ids, labels in zip(found, trained, strict=True) if any(ids)]  # padding is 0
    assert sorted(ids for ids, _ in real) == sorted(row["input_ids"] for row in rows)
    assert all(labels == [IGNORED, *ids[1:]] for ids, labels in real)
    assert (batch["labels"] != IGNORED).sum() == sum(lengths) - len(lengths)
    assert batch["num_tokens"].tolist() == lengths


def test_a_data_set_is_packed_into_full_sequences_once_a_host(tmp_path):
    generator = random.Random(0)
    lengths = [min(2048, round(generator.lognormvariate(5, 1)) + 1) for _ in range(3000)]
    numbers = [[place] * length for place, length in enumerate(lengths)]
    rows = {"input_ids": numbers, "labels": numbers, "length": lengths, "digest": lengths}
    splits = {"train": Dataset.from_dict(rows, FEATURES), "validation": Dataset.from_dict(rows, FEATURES)}
    settings = Settings(packing=True, eval_packing=False).data
    for _ in range(2):  # the second time after a restart in place
        packing = Packing("data set", "", stack())
        sequences = packing.pack(splits, settings, 42, tmp_path)
        assert sequences["validation"] is splits["validation"]
        packed = sequences["train"]
        assert max(map(sum, packed["seq_lengths"])) <= 2048
        assert sorted(length for row in packed["seq_lengths"] for length in row) == sorted(lengths)
        assert packing.splits["train"].fill_ratio >= 0.97
        assert str(packing.splits["train"]).startswith(f"packed 3000 rows into {len(packed)} sequences, 9")
        described = packing.describe()["train"]
        assert (described["num_sequences"], described["num_rows"]) == (len(packed), 3000)
        assert described["filled"] == packing.splits["train"].fill_ratio


def build_arguments(**values):
    usual = {"pad_to_multiple_of": None, "parallelism_config": None, "device": torch.device("cpu")}
    return SimpleNamespace(**{**usual, "fp16": False, "bf16": False, **values})


def choose(config, **settings):
    arguments = build_arguments(parallelism_config=settings.get("parallelism_config"), bf16=settings.pop("bf16", False))
    return choose_packing(build_model(config), build_tokenizer(), arguments, Settings(**settings).data, None)


def test_rows_are_packed_by_default_where_the_model_keeps_them_apart():
    assert str(choose(KEEP_APART["llama"])) == (
        "Packing: the rows of a batch share sequences (eager attention keeps them apart)"
    )
    assert choose(KEEP_APART["llama"], packing=True).mode == "data set"
    assert choose(LEAK["mamba"]).mode == "off"
    assert choose(LEAK["mamba"]).collator is None
    assert choose(KEEP_APART["llama"], packing=False).mode == "off"
    assert choose(KEEP_APART["llama"], bf16=True).mode == "batch"
    assert "may split a sequence" in str(choose(KEEP_APART["llama"], parallelism_config={"cp_size": 2}))


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_answers_do_not_share_sequences_either_where_the_model_lets_them_see_each_other(method):
    for configs, mode in ((KEEP_APART["qwen3"], "batch"), (LEAK["bloom"], "off")):
        config = copy.deepcopy(configs)
        if method == "reward":
            describe_rewards(config)
        packing = choose(config, method=method)
        assert packing.mode == mode
        assert (packing.collator is None) == (mode == "off")
    assert re.search("Bloom.* lets a row see the one before it", str(packing))


def test_a_teacher_reads_the_positions_of_its_student():
    """A model that sees counts them on several axes, and one of texts does not: its rows are padded then."""
    images, texts, settings = build_tiny_config("qwen2_5_vl"), KEEP_APART["llama"], Settings(method="distill").data
    packing = choose(images, method="distill")
    assert packing.collator.num_axes == 4
    assert examine_model(packing, build_model(images), build_arguments(), settings, None) is packing
    assert examine_model(packing, build_model(texts), build_arguments(), settings, None).mode == "off"
    padded = choose(LEAK["mamba"])
    assert examine_model(padded, build_model(texts), build_arguments(), settings, None) is padded


@pytest.mark.parametrize("name", ["packing", "eval_packing"])
def test_packing_is_refused_with_the_reason_where_the_model_does_not_keep_rows_apart(name):
    with pytest.raises(UserError, match=f"^{name}=true: MambaForCausalLM .* lets a row see the one before it"):
        choose(LEAK["mamba"], **{name: True})
