# SPDX-License-Identifier: Apache-2.0
"""Lines of the log about the data, and the sample with what is trained on marked."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from llm_trainer.config.schema import Settings
from llm_trainer.data.datasets import Data
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats.examples import IGNORED, Conversation
from llm_trainer.data.preview import (
    advise_weights,
    choose_sample,
    describe_judgements,
    describe_marks,
    find_data_warnings,
    log_data,
    mark_sample,
)
from llm_trainer.data.report import DataReport
from llm_trainer.readers.images import ImageRules
from llm_trainer.readers.thumbnails import is_thumbnail
from support.image_rows import PAIRS, ROWS, build_vocabulary, prepare_rows, save_pictures
from support.tiny_model import build_tokenizer

RULES = ImageRules(10**7)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def encode_chat(tokenizer):
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    (row,) = Encoder(vocabulary, Settings().data, "messages").encode([Conversation(CHAT)])
    return {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}


def test_the_sample_marks_what_is_trained_on():
    tokenizer = build_tokenizer()
    row = encode_chat(tokenizer)
    assert mark_sample(row, tokenizer, in_colour=False).endswith("assistant\n⟦yo<|im_end|>⟧\n")
    assert mark_sample(row, tokenizer, in_colour=True).endswith("assistant\n\x1b[32myo<|im_end|>\x1b[0m\n")


def test_a_long_sample_is_shown_by_its_ends():
    tokenizer = build_tokenizer()
    ids = tokenizer("a" * 300 + "b" * 300)["input_ids"]
    labels = np.where(np.arange(len(ids)) < 3, ids, IGNORED).tolist()
    sample = mark_sample({"input_ids": ids, "labels": labels}, tokenizer, in_colour=False)
    assert sample == f"⟦aaa⟧{'a' * 97}\n[...]\n{'b' * 100}"


def test_counts_warnings_and_the_sample_are_logged_in_order(capsys):
    tokenizer = build_tokenizer()
    report = DataReport(
        formats={"train": "messages"},
        loss_on={"train": "assistant turns"},
        num_rows=2,
        num_tokens=8,
        num_supervised_tokens=2,
        num_supervised_eos=1,
        num_duplicate_rows=1,
        lengths=Counter({4: 2}),
    )
    rows = Dataset.from_list([encode_chat(tokenizer)])
    sample = choose_sample([rows], RULES)
    log_data(Data({"train": rows}, rows, {"train": report}), sample, tokenizer, in_colour=False)
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"Data train: {report}; lengths: p50 4, p90 4, p95 4, p99 4, longest 4",
        "Data train: train has messages rows; trained on: assistant turns",
        "Warning: 1 rows of the train data repeat an earlier one.",
        "Data train, the first row (between ⟦ and ⟧: trained on):",
    ]


def test_every_kind_of_row_that_is_missing_or_doubtful_is_told():
    report = DataReport(
        num_rows_in_validation=1,
        num_duplicate_rows=2,
        num_truncated_rows=3,
        num_dropped_rows=4,
        num_unsupervised_rows=5,
        num_bad_rows=6,
        unread_fields=Counter({"images of train_a": 7}),
    )
    warnings = list(find_data_warnings("train", report))
    assert [text.split()[0] for text in warnings] == ["1", "2", "the", "3", "4", "5", "6", "no"]
    assert "has fields that nothing reads: images of train_a (7 rows). Rename" in warnings[2]
    assert list(find_data_warnings("train", DataReport(num_supervised_eos=1))) == []


def test_control_tokens_in_messages_are_told_with_their_rows():
    chunk = DataReport(num_rows=3, num_supervised_eos=3)
    chunk.control_tokens.update({"<|im_end|>": 2, "</s>": 1})
    report = DataReport()
    for part in (chunk, chunk):
        report.add_report(part)
    read = DataReport.from_json(json.loads(json.dumps(vars(report))))
    (warning,) = find_data_warnings("train", read)
    assert "(<|im_end|> in 4, </s> in 2), which the model reads as such. escape_control_tokens=true" in warning


TOKENIZER = build_tokenizer()
PAIR = {
    "input_ids": TOKENIZER("Q? yes")["input_ids"] + TOKENIZER("Q? no")["input_ids"],
    "labels": [IGNORED] * 3 + [1] * 3 + [IGNORED] * 3 + [1] * 2,
    "seq_lengths": [6, 5],
}


def test_the_prompt_of_a_pair_is_shown_once_and_each_side_with_marks_of_its_own():
    assert mark_sample(PAIR, TOKENIZER, in_colour=False) == "Q? \n⟦yes⟧\n⟪no⟫"
    assert mark_sample(PAIR, TOKENIZER, in_colour=True) == "Q? \n\x1b[32myes\x1b[0m\n\x1b[31mno\x1b[0m"
    assert describe_marks(False, has_pairs=True) == "between ⟦ and ⟧: chosen, between ⟪ and ⟫: rejected"
    assert describe_marks(True, has_pairs=True) == "green: chosen, red: rejected"


def build_pair_report(chosen, rejected, **counts):
    lengths = Counter([*chosen, *rejected])
    sides = {"chosen_lengths": Counter(chosen), "rejected_lengths": Counter(rejected)}
    return DataReport(sequences_a_row=2, lengths=lengths, num_rows=len(chosen), num_supervised_eos=1, **sides, **counts)


def test_what_is_odd_about_pairs_is_told_with_its_count():
    report = build_pair_report([10], [11], num_equal_pairs=2, num_swapped_pairs=3, num_cut_answers=4)
    equal, swapped, cut = find_data_warnings("train", report)
    assert equal.startswith("2 pairs of the train data are left out, since chosen and rejected are the same")
    assert swapped.startswith("3 pairs of the train data have a lower score for the chosen answer")
    assert cut == "4 answers of the train data lose tokens to max_length."


@pytest.mark.parametrize(
    ("chosen", "rejected", "told"),
    [
        ([12], [10], []),
        ([13], [10], ["longer than the rejected ones, 13 tokens on average to 10:"]),
        ([10, 10], [10, 20], ["shorter than the rejected ones, 10 tokens on average to 15:"]),
    ],
)
def test_a_length_bias_is_told_with_both_numbers(chosen, rejected, told):
    warnings = list(find_data_warnings("train", build_pair_report(chosen, rejected)))
    assert len(warnings) == len(told)
    assert all(text in warning for text, warning in zip(told, warnings, strict=True))


def build_judged_report(desirable, undesirable):
    sides = {"chosen_lengths": Counter(desirable), "rejected_lengths": Counter(undesirable)}
    counts = {"num_rows": len(desirable) + len(undesirable), "num_desirable_rows": len(desirable)}
    return DataReport(lengths=Counter([*desirable, *undesirable]), num_supervised_eos=1, **counts, **sides)


def test_judged_answers_are_counted_by_kind_and_warned_of_by_length():
    report = build_judged_report([4, 4], [2, 2])
    assert describe_judgements(report).startswith("50.0% of the answers are desirable: 2 desirable, tokens mean 4.0")
    (warning,) = find_data_warnings("train", report)
    assert warning.startswith("the desirable answers of the train data are longer than the undesirable ones, 4 tokens")
    row = {**PAIR, "seq_lengths": [len(PAIR["input_ids"])]}
    assert "⟪" not in mark_sample(row, TOKENIZER, in_colour=False)


@pytest.mark.parametrize(
    ("desirable", "undesirable", "weights", "ranges"),
    [
        (4, 4, {}, None),
        (4, 3, {}, None),
        (2, 4, {}, "desirable_weight between 2.00 and 2.66, or undesirable_weight between 0.38 and 0.50."),
        (2, 4, {"desirable_weight": 2.2}, None),
        (2, 4, {"undesirable_weight": 0.4}, None),
        (6, 2, {}, "desirable_weight between 0.33 and 0.44, or undesirable_weight between 2.26 and 3.00."),
    ],
)
def test_weights_that_do_not_make_up_for_uneven_kinds_are_told(desirable, undesirable, weights, ranges):
    """The ranges are those that TRL recommends."""
    report = build_judged_report([3] * desirable, [3] * undesirable)
    advice = list(advise_weights(report, Settings(method="kto", **weights).methods))
    assert [text.partition("set either ")[2] for text in advice] == ([ranges] if ranges else [])


def test_rows_that_nobody_judged_need_no_weights():
    assert list(advise_weights(build_pair_report([1, 1], [1]), Settings(method="dpo").methods)) == []


def test_the_sample_is_the_first_row_with_images_and_tells_each(tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_vocabulary("qwen", tmp_path)
    rows, _ = prepare_rows(vocabulary, [ROWS[1], ROWS[2], ROWS[0]], tmp_path)
    sample = choose_sample([rows], RULES)
    *_, text, first, second = sample.mark(vocabulary.tokenizer, in_colour=False).rsplit("\n", 2)
    first_words, second_words = (line.removeprefix(f"image {number}: ") for number, line in ((1, first), (2, second)))
    assert sample.name == "the first row with images"
    text = text.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    assert f"[image 1: {first_words}] and [image 2: {second_words}] differ?" in text
    assert "⟦Much." in text and "<|image_pad|>" not in text
    starts = [own["start"] for own in rows[1]["pictures"]]
    assert [words.split(", ")[:2] for words in (first_words, second_words)] == [
        ["bytes of the row", "40 x 90 pixels"],
        ["2.png", "30 x 30 pixels"],
    ]
    told = zip(starts, (first_words, second_words), strict=True)
    assert all(f"from token {start} on" in words for start, words in told)
    shown = sample.describe(vocabulary.tokenizer)["sample"]
    assert [is_thumbnail(image["thumbnail"]) for image in shown["images"]] == [True, True]
    assert not shown["text"].endswith(second)


def test_the_images_of_a_pair_are_shown_once_in_its_prompt(tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_vocabulary("qwen", tmp_path)
    rows, _ = prepare_rows(vocabulary, PAIRS[:1], tmp_path, method="dpo")
    sample = choose_sample([rows], RULES)
    text = sample.mark(vocabulary.tokenizer, in_colour=False)
    assert text.count("0.png") == 2 and "<|image_pad|>" not in text  # in the text, and below
    assert text.count("What is it?") == 1
    assert text.index("[image 1: 0.png") < text.index("⟦A cat.") < text.index("⟪No idea at all.")


def test_placeholders_without_a_column_of_images_are_told(tmp_path):
    save_pictures(tmp_path)
    vocabulary = build_vocabulary("qwen", tmp_path)
    renamed = {"messages": ROWS[0]["messages"], "pictures": ROWS[0]["images"]}
    _, report = prepare_rows(vocabulary, [renamed, renamed, ROWS[0], ROWS[1]], tmp_path)
    (warning, unread) = find_data_warnings("train", report)
    assert warning.startswith("2 rows of the train data have the text <image> and no column 'images' or 'image'")
    assert "pictures" in unread


def test_a_sample_of_texts_is_the_first_row_and_leaves_nothing_in_the_journal(tmp_path):
    rows = Dataset.from_list([encode_chat(build_tokenizer())])
    sample = choose_sample([rows.select([]), rows], RULES)
    assert (sample.row, sample.name, sample.describe(build_tokenizer())) == (rows[0], "the first row", {})
    assert choose_sample([rows.select([])], RULES) is None


def test_an_image_that_is_gone_is_told_without_its_size(tmp_path):
    save_pictures(tmp_path)
    rows, _ = prepare_rows(build_vocabulary("qwen", tmp_path), ROWS[:1], tmp_path)
    (tmp_path / "0.png").unlink()
    (image,) = choose_sample([rows], RULES).images
    assert image.keys() == {"name", "start", "tokens"} and image["name"] == "0.png"
