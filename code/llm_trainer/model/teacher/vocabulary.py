# SPDX-License-Identifier: Apache-2.0
"""The vocabularies of a teacher and its student, which have to be the same: the loss compares token by token."""

from collections.abc import Mapping

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.config.sections import ModelSettings
from llm_trainer.model.loading import build_source_options, explain_failure

FIX = "give a teacher of the model's family, with the same tokenizer"


def check_vocabulary(
    teacher: ModelSettings,
    folder: str,
    config: PreTrainedConfig,
    student: PreTrainedConfig,
    words: Mapping[str, int] | None,
) -> None:
    """Raise UserError where a teacher has another vocabulary than the student.

    `words` are the tokens of the student's tokenizer with their numbers, special ones among them. None: no tokenizer is
    compared.
    """
    own, other = student.get_text_config().vocab_size, config.get_text_config().vocab_size
    subject = f"model_id={teacher.model_id!r}"
    if own != other:
        raise UserError(
            f"{subject} tells {other} tokens apart and the student {own}, and each of the one's probabilities is "
            f"compared with the other's: {FIX} and vocab_size."
        )
    if words is not None and (difference := find_difference(load_words(folder, teacher), words)):
        raise UserError(f"{subject} has another vocabulary than the student ({difference}): {FIX}.")


def load_words(folder: str, teacher: ModelSettings) -> Mapping[str, int]:
    """Return the tokens of a teacher's tokenizer with their numbers. Raise UserError where it cannot be read."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **build_source_options(teacher))
    except Exception as error:  # the library behind it raises no narrower class
        raise UserError(explain_failure(error, folder, "tokenizer")) from error
    words: Mapping[str, int] = tokenizer.get_vocab()
    return words


def find_difference(teacher: Mapping[str, int], student: Mapping[str, int]) -> str | None:
    """Return the first token that two vocabularies number otherwise, as words for a message; None where none is."""
    if teacher == student:
        return None
    others = [word for word in student.keys() | teacher.keys() if teacher.get(word) != student.get(word)]
    word = min(others, key=lambda word: (student.get(word, teacher.get(word)), word))
    return f"{cut_quote(repr(word))} is {show_number(teacher, word)} there and {show_number(student, word)} here"


def show_number(words: Mapping[str, int], word: str) -> str:
    """Return the number of a token as a word of a message."""
    return f"token {words[word]}" if word in words else "no token"
