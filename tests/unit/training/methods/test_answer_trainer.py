# SPDX-License-Identifier: Apache-2.0
"""What trainers of answers share: a row counts once, and one that only fills a batch for nothing."""

import pytest
import torch

from llm_trainer.training.batches.whole_batches import fill_batches
from llm_trainer.training.methods.answer_trainer import compute_answers
from llm_trainer.training.methods.answers import ANSWERS
from llm_trainer.training.packing import PackingCollator
from support.preference_pairs import build_judged_rows, build_lora, build_pair_trainer, build_rows

ROWS = {"dpo": build_rows(3), "kto": build_judged_rows(3)}


def build(model, folder, method, collator=None):
    return build_pair_trainer(model, ROWS[method], folder, collator, build_lora(), method=method)


@pytest.mark.parametrize("method", ROWS)
def test_a_row_that_only_fills_a_batch_has_no_share_of_a_step(tiny_model, tmp_path, method):
    trainer = build(tiny_model, tmp_path, method)
    blank = list(fill_batches(ROWS[method], 4, trainer.sequences_a_row))[-1:]
    batches = [trainer._prepare_inputs(trainer.data_collator(rows)) for rows in (list(ROWS[method]), blank)]
    total = trainer._get_num_items_in_batch(batches, trainer.args.device)
    whole, nothing = (trainer.compute_loss(trainer.model, batch, num_items_in_batch=total) for batch in batches)
    assert (int(total), nothing.item()) == (3, 0.0)
    assert whole.item() == pytest.approx(trainer.line_sums.means["loss"])


@pytest.mark.parametrize("method", ROWS)
def test_packed_answers_are_computed_as_padded_ones(tiny_model, tmp_path, method):
    found = []
    for collator in (PackingCollator(0, None, flattens=False), None):
        trainer = build(tiny_model, tmp_path, method, collator)
        batch = trainer._prepare_inputs(trainer.data_collator(list(ROWS[method])))
        assert batch[ANSWERS].num_rows == 3
        found.append(compute_answers(trainer.model, batch).log_probs)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
