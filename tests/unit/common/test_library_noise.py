# SPDX-License-Identifier: Apache-2.0
"""Noise is named: the libraries' own words are dropped, and everything else they say passes."""

import logging
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm_trainer.common.library_noise import LOG_MESSAGES, USER_WARNINGS, silence_libraries


@pytest.fixture(autouse=True)
def silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        silence_libraries()
        silence_libraries()
        yield
    for name, _ in LOG_MESSAGES:
        logging.getLogger(name).filters.clear()


def read_source(module):
    """The text of a module that is not imported, without what splits a message over lines."""
    package, *rest = module.split(".")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    file = Path(find_spec(package).origin).parent.joinpath(*rest).with_suffix(".py")
    return re.sub(r'"\s+f?r?"', "", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "beginning"), LOG_MESSAGES)
def test_a_named_message_is_dropped_and_others_pass(caplog, name, beginning):
    logger = logging.getLogger(name)
    assert len(logger.filters) == 1
    logger.warning(f"{beginning} %s", "something")
    logger.warning("Another message")
    assert caplog.messages == ["Another message"]


@pytest.mark.parametrize(
    ("module", "category", "text", "is_told"),
    [
        ("peft.tuners.lora.layer", UserWarning, "fan_in_fan_out is set to True but the target module is `x`", False),
        ("peft.tuners.tuners_utils", UserWarning, "Another warning", True),
        ("somewhere.else", UserWarning, "fan_in_fan_out is set to True but the target module is `x`", True),
        ("somewhere.else", FutureWarning, "an argument goes", False),
        ("somewhere.else", RuntimeWarning, "a number overflowed", True),
    ],
)
def test_a_named_warning_is_dropped_and_others_pass(recwarn, module, category, text, is_told):
    silence_libraries()
    warnings.warn_explicit(text, category, "file.py", 1, module)
    assert bool(recwarn.list) == is_told


@pytest.mark.parametrize(("name", "beginning"), LOG_MESSAGES)
def test_the_pinned_libraries_log_these_messages(name, beginning):
    assert beginning in read_source(name)


@pytest.mark.parametrize(("module", "beginning"), USER_WARNINGS)
def test_the_pinned_libraries_warn_so(module, beginning):
    plain = re.sub(r"\\(.)", r"\1", beginning.replace("(False|True)", "True").replace("(PiSSA|CorDA|OLoRA)", "PiSSA"))
    source = read_source(module.replace("\\", ""))
    assert plain.replace("the tied_target_modules=", "the {tied_target_modules=}") in source
