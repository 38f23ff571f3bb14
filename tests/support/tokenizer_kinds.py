# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of every kind that models have, and a word in each script of Unicode."""

import sys
import unicodedata

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS

EOS = "<|im_end|>"
SPACE = "▁"
BLOCK = 16  # all blocks of Unicode begin at a multiple
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
