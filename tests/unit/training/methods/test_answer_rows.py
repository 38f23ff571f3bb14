# SPDX-License-Identifier: Apache-2.0
"""A trainer of answers keeps its rows' columns, and weighs a batch by its rows."""

import torch

from support.preference_pairs import build_lora, build_pair_trainer, build_rows


def test_a_batch_counts_by_its_rows(tiny_model, tmp_path):
    trainer = build_pair_trainer(tiny_model, build_rows(5), tmp_path, lora=build_lora())
    batches = [trainer.data_collator(list(trainer.train_dataset)[:size]) for size in (3, 2)]
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) == 5
    assert trainer.scale_loss(torch.tensor(2.0), 3, torch.tensor(4)) == 1.5
    assert trainer.scale_loss(torch.tensor(2.0), 3, None) == 2


def test_the_columns_of_a_pair_are_kept(tiny_model, tmp_path):
    trainer = build_pair_trainer(tiny_model, build_rows(2), tmp_path, lora=build_lora())
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "seq_lengths", "row", "length"} <= {*trainer._signature_columns}
