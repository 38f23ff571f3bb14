# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.common.redaction import SECRET_VARIABLES, hide_in, hide_secrets


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_secrets_of_the_environment_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t")
    assert hide_secrets("before s3cr3t after") == "before *** after"


def test_passwords_in_addresses_and_given_secrets_are_hidden():
    assert hide_secrets("https://me:pass@host/path and mine", ["mine", ""]) == "https://***@host/path and ***"


def test_texts_are_hidden_however_deep_they_lie():
    value = {"a": ["https://me@host", 1, None], "b": ("x", {"c": "http://u:p@h"})}
    assert hide_in(value) == {"a": ["https://***@host", 1, None], "b": ["x", {"c": "http://***@h"}]}
