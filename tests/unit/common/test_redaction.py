# SPDX-License-Identifier: Apache-2.0
"""Secrets are known by their value, however a program writes it, and by the place where they stand."""

import base64
import html
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from pydantic import SecretStr

from llm_trainer.common.redaction import hide_in, hide_known, hide_queries, hide_secrets, is_secret_name, note_secrets

SECRET = "hf_Ab/+d\"e'f%12 \u00e9"
NAMED = (
    *("token", "hub_token", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "use_auth_token", "apiKey", "WANDB_API_KEY"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "db-passwd", "clientSecret"),
    *("Authorization", "X-Amz-Security-Token", "credentials"),
)
UNNAMED = (
    *("tokens_per_second", "max_tokens", "max_new_tokens", "pad_token", "eos_token", "pad_token_id", "token_ids"),
    *("tokenizer", "num_tokens", "key", "sort_key", "AWS_SHARED_CREDENTIALS_FILE", "secret_arn", "hub_model_id"),
    "PWD",  # the working folder, which a shell keeps there
)


@pytest.mark.parametrize("name", NAMED)
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert hide_in({name: {"deep": ["x"]}}) == {name: "***"}
    assert hide_secrets(f"{{'{name}': 'x', 'a': 1}} {name}=x") == f"{{'{name}': '***', 'a': 1}} {name}=***"


@pytest.mark.parametrize("name", UNNAMED)
def test_names_of_no_secrets(name):
    assert not is_secret_name(name)
    assert hide_in({name: "x"}) == {name: "x"}
    assert hide_secrets(f"{name}='x'; {name}=12") == f"{name}='x'; {name}=12"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_secrets_of_the_environment_are_hidden_with_a_line_break_at_their_end_or_without(monkeypatch, name):
    monkeypatch.setenv(name, "s3cr3t-of-mine\n")
    assert hide_secrets("before s3cr3t-of-mine after") == "before *** after"


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        quote(SECRET),
        re.sub("%..", lambda code: code[0].lower(), quote(SECRET, safe="")),
        quote_plus(SECRET),
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        repr(SECRET)[1:-1],
        html.escape(SECRET),
        SECRET.encode().hex(),
        f"{SECRET[:5]}\n    {SECRET[5:]}",
        f"{SECRET[:5]}\\n{SECRET[5:]}",
    ],
)
def test_a_secret_is_hidden_however_it_is_written(written):
    assert hide_secrets(f"<{written}>") == f"<{written}>"
    note_secrets({"token": SECRET})
    assert hide_secrets(f"<{written}>") == hide_known(f"<{written}>") == "<***>"


@pytest.mark.parametrize("before", ["", "a", "me", "user"])
@pytest.mark.parametrize("break_at", [None, 12])
def test_a_secret_in_base64_is_hidden_wherever_it_begins(before, break_at):
    note_secrets({"password": SECRET})
    encoded = base64.b64encode(f"{before}:{SECRET}.".encode()).decode()
    written = encoded if break_at is None else f"{encoded[:break_at]}\n{encoded[break_at:]}"
    left = hide_secrets(written)
    assert "***" in left
    assert len(left) < 14


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://me:pass@host/path", "https://***@host/path"),
        ("https://me:p@ss@host", "https://***@host"),
        ("https://me:p/w@host", "https://***@host"),
        ("https://me:p@s/w@host/x", "https://***@host/x"),
        ("http://host:443/a@b and https://host/@scope/x", "http://host:443/a@b and https://host/@scope/x"),
        ("https://h/x?token=abc&y=1", "https://h/x?token=***&y=1"),
        (
            "s3://b?X-Amz-Credential=A%2FB&X-Amz-Signature=1f&X-Amz-Security-Token=q&X-Amz-Expires=9",
            "s3://b?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Security-Token=***&X-Amz-Expires=9",
        ),
        ("http://h?a=1&amp;Signature=x&Expires=9", "http://h?a=1&amp;Signature=***&Expires=9"),
        ("Authorization: Basic bWU6cHc=", "Authorization: Basic ***"),
        ('{"a": "{\\"token\\": \\"x\\"}"}', '{"a": "{\\"token\\": \\"***\\"}"}'),
        ("token=None use_auth_token=True HF_TOKEN='arn:aws:x'", "token=None use_auth_token=True HF_TOKEN='arn:aws:x'"),
        (f"took hf_{'a1' * 17}.", "took ***."),
        ("give a token, or a password: as you like", "give a token, or a password: as you like"),
    ],
)
def test_a_secret_is_known_by_its_place(text, hidden):
    assert hide_secrets(text) == hidden


def test_a_password_of_an_address_is_hidden_where_it_stands_alone():
    note_secrets({"mlflow_uri": "https://me:pass%40word-1@host"})
    assert hide_known("tried pass@word-1, and pass%40word-1") == "tried ***, and ***"


@pytest.mark.parametrize("secret", ["x", "training", "aaaaaaaaaaaaaaaaaaaa", "12345678", "", " \n"])
def test_a_short_or_plain_secret_makes_no_holes_in_other_texts(secret):
    note_secrets({"api_key": secret})
    text = "training on 12345678 rows, xaaaaaaaaaaaaaaaaaaaaa"
    assert hide_secrets(text) == text
    assert hide_in({"api_key": secret}) == {"api_key": "***" if secret else ""}


def test_secrets_are_hidden_however_deep_they_lie():
    note_secrets({"model_init_kwargs": {"token": SECRET}})
    value = {"a": ["https://me@host", 1, None, 0.5, True], "b": ({"c": SECRET},), SECRET: SecretStr("x")}
    assert hide_in(value) == {"a": ["https://***@host", 1, None, 0.5, True], "b": [{"c": "***"}], "***": "**********"}


@pytest.mark.parametrize(
    "write", [str, json.dumps, lambda text: json.dumps(text).replace("/", "\\/").replace("&", "\\u0026")]
)
@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://host/a%20b.png?X-Amz-Signature=5ec&x='5ec'#5ec", "https://host/a%20b.png"),
        ("https://me:p@ss@host:80/a.png#5ec", "https://host:80/a.png"),
        ("s3://bucket/a.png?versionId=1", "s3://bucket/a.png"),
        ("file:/a.png?b", "file:/a.png"),
        ("https://host/@scope/a.png", "https://host/@scope/a.png"),
        ("a#1?.png", "a#1?.png"),
    ],
)
def test_an_address_is_shown_without_what_may_sign_it(write, address, shown):
    assert hide_queries(write(address)) == write(shown)
    assert hide_queries(write(f"Is {address}\nred? {address}")) == write(f"Is {shown}\nred? {shown}")
    assert hide_queries(write(json.dumps({"url": address}))) == write(json.dumps({"url": shown}))


def test_the_time_grows_with_the_length_alone():
    for text in (
        "a" * 10**5,
        "://" * 10**4,
        "token='" * 10**4,
        "://a:" * 10**4,
        "authorization" * 10**4,
        "://" + "a@" * 10**5,
    ):
        assert len(hide_secrets(text)) <= len(text) >= len(hide_queries(text))
