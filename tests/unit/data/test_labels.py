# SPDX-License-Identifier: Apache-2.0
"""Trained tokens are the text that is trained on, and its end, in every script and with every kind of tokenizer."""

import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Encoder, Vocabulary
from llm_trainer.data.formats import IGNORED, parse_example
from support.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS

EOS = "<|im_end|>"
SPACE = "▁"
BLOCK = 16  # all blocks of Unicode begin at a multiple
PARTY = "\N{PARTY POPPER}"
WORDS = ["Mood of: we won the cup\nMood: positive negative 1234\n\n"] * 3


def sample_unicode():
    """Yield a word of up to three letters from each block that has any; large blocks of one script count once."""
    previous = None
    for start in range(0, sys.maxunicode, BLOCK):
        letters = [letter for letter in map(chr, range(start, start + BLOCK)) if is_visible(letter)]
        script = unicodedata.name(letters[0], "?").split()[0] if letters else None
        if letters and script != previous:
            yield "".join(dict.fromkeys((letters[0], letters[len(letters) // 2], letters[-1])))
        previous = script


def is_visible(letter):
    """Tell whether it is neither white space, a control character, nor unassigned."""
    return unicodedata.category(letter)[0] not in "CZ"


LETTERS = list(sample_unicode())


def build_byte_level(trims_offsets=False):
    """As GPT-2, Llama 3 and Qwen have it: a character outside ASCII is two to four tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    )
    return backend


def build_trimming():
    """Byte-level, with offsets that leave white space out, as Llama 3's."""
    return build_byte_level(trims_offsets=True)


def build_byte_fallback(normalizer=None, pre_tokenizer=None):
    """As Llama 2, Mistral and Gemma have it: bytes stand for letters that are not in the vocabulary."""
    tokens = [*SPECIAL_TOKENS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({SPACE, *"".join(WORDS)})]
    tokens += [SPACE + "p", "po", SPACE + "po", SPACE * 2]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [(SPACE, "po"), ("p", "o"), (SPACE, "p"), (SPACE, SPACE)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return backend


def build_normalizing():
    """Byte fallback, and a space that the normalizer puts before each text, as Llama 2's first files have it."""
    return build_byte_fallback(normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]))


def build_metaspace():
    """Byte fallback, and a space before the first piece of a text, as Llama 2's later files have it."""
    return build_byte_fallback(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def build_unigram():
    """As T5 and XLNet have it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=4000, unk_token="<unk>", special_tokens=["<unk>", *SPECIAL_TOKENS], initial_alphabet=[]
    )
    backend.train_from_iterator([*WORDS, *LETTERS, *LETTERS], trainer)
    return backend


def build_word_piece():
    """As BERT has it: white space is no token."""
    letters = sorted({*"".join(WORDS), *"".join(LETTERS)})
    tokens = dict.fromkeys([*SPECIAL_TOKENS, "[UNK]", *letters, *("##" + letter for letter in letters)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


BUILDERS = [
    *(build_byte_level, build_trimming, build_normalizing, build_metaspace, build_unigram, build_word_piece),
]


def wrap(backend):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer, rows, row_format):
    settings = Settings().data
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    encoder = Encoder(vocabulary, settings, row_format)
    return encoder.encode([parse_example(row, row_format, settings, True) for row in rows])


def decode_trained(tokenizer, row):
    return tokenizer.decode([label for label in row.labels.tolist() if label != IGNORED])


ROWS = {
    "prompt_completion": lambda text: {"prompt": "Mood:", "completion": f" {text}"},
    "messages": lambda text: {"messages": chat(text, "role", "content", "user", "assistant")},
    "sharegpt": lambda text: {"conversations": chat(text, "from", "value", "human", "gpt")},
    "alpaca": lambda text: {"instruction": "Mood?", "output": text},
}


def chat(text, role, content, *names):
    return [{role: name, content: said} for name, said in zip(names * 2, ("a", text, "b", text), strict=True)]


@pytest.mark.parametrize("row_format", ROWS)
@pytest.mark.parametrize("build", BUILDERS)
def test_what_is_trained_on_is_the_answers_text_and_its_end(build, row_format):
    tokenizer = wrap(build())
    rows = encode(tokenizer, [ROWS[row_format](text) for text in LETTERS], row_format)
    for text, row in zip(LETTERS, rows, strict=True):
        turns = 2 if row_format in ("messages", "sharegpt") else 1
        assert decode_trained(tokenizer, row).replace(" ", "") == f"{text}{EOS}" * turns
        assert row.labels[-1] != IGNORED or tokenizer.decode(row.input_ids[-1:]).isspace()


def test_an_emoji_at_the_end_is_trained_on_with_the_end():
    tokenizer = wrap(build_byte_level())
    [row] = encode(tokenizer, [{"prompt": "Mood of: we won\nMood:", "completion": f" {PARTY}"}], "prompt_completion")
    assert decode_trained(tokenizer, row) == f" {PARTY}{EOS}"


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("prompt", ["Mood: ", "Mood:  ", "Mood:\n", "Mood: po", "Mood: 12", "Mood:"])
@pytest.mark.parametrize("completion", ["positive", "34", "\npositive", " positive", "  positive"])
def test_a_prompt_is_tokenized_as_a_server_does(build, prompt, completion):
    """A server sends the prompt alone, and the model answers with the tokens that the answer itself is made of."""
    tokenizer = wrap(build())
    [row] = encode(tokenizer, [{"prompt": prompt, "completion": completion}], "prompt_completion")
    served = tokenizer(prompt)["input_ids"]
    assert row.input_ids[: len(served)].tolist() == served
    assert (row.labels[: len(served)] == IGNORED).all()
    assert (row.labels[len(served) :] != IGNORED).all()
    if build is not build_word_piece:  # whose tokens hold no white space
        assert decode_trained(tokenizer, row) == f"{completion}{EOS}"


def test_rows_in_pieces_are_told_apart():
    tokenizer = wrap(build_byte_level())
    rows = [{"prompt": "Mood: ", "completion": "positive"}, {"prompt": "Mood:", "completion": " positive"}]
    assert [row.is_in_pieces for row in encode(tokenizer, rows, "prompt_completion")] == [True, False]


def test_an_answer_that_begins_with_the_white_space_of_its_turn_is_tokenized_apart():
    tokenizer = wrap(build_trimming())
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    messages = chat("\npositive", "role", "content", "user", "assistant")
    [row] = encode(tokenizer, [{"messages": messages}], "messages")
    assert decode_trained(tokenizer, row) == f"\npositive{EOS}" * 2
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert row.input_ids[: len(prompt)].tolist() == prompt
