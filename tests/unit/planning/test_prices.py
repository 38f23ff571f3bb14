# SPDX-License-Identifier: Apache-2.0
"""A price file: kept, passed on, refused where it is damaged, and warned of where it does not fit."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.planning.prices import (
    ASSUMED_SPOT_SAVING,
    Prices,
    find_price_file,
    find_warnings,
    read_prices,
    write_prices,
)
from support.documents import DOCS, read_blocks

ASKED_AT = datetime(2026, 11, 26, 18, 30, tzinfo=UTC)
PRICES = Prices(region="eu-central-1", asked_at=ASKED_AT, currency="USD", on_demand={"ml.g5.xlarge": 1.76})
FIX = "): ask AWS anew with `llm-trainer plan --prices`."


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prices.json"


def test_prices_are_kept(file):
    write_prices(PRICES, file)
    assert json.loads(file.read_text()) == {
        "version": 1,
        "region": "eu-central-1",
        "asked_at": "2026-11-26T18:30:00Z",
        "currency": "USD",
        "on_demand": {"ml.g5.xlarge": 1.76},
        "spot_savings": {},
    }
    assert read_prices(file) == PRICES
    assert PRICES.origin == "prices of eu-central-1 in USD, asked on 2026-11-26"


def test_the_documents_file_is_one():
    (block,) = [block for block in read_blocks(DOCS / "planning.md") if '"on_demand"' in block.text]
    assert Prices.model_validate(json.loads(block.text)).spot["ml.g5.2xlarge"] == pytest.approx(0.38 * 1.515)


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"prices\.json cannot be written \(No such file or directory\): name another"):
        write_prices(PRICES, tmp_path / "missing/prices.json")


def test_spot_is_what_the_user_knows_or_an_assumption():
    known = PRICES.model_copy(update={"spot_savings": {"ml.g5.xlarge": 0.7, "ml.p5.48xlarge": 0.2}})
    assert known.spot == {"ml.g5.xlarge": pytest.approx(0.3 * 1.76)}
    assert PRICES.spot == {"ml.g5.xlarge": pytest.approx((1 - ASSUMED_SPOT_SAVING) * 1.76)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"region": None}, "region: field required"),
        ({"asked_at": "2026-11-26"}, "asked_at='2026-11-26': input should have timezone info"),
        ({"asked_at": "yesterday"}, "asked_at='yesterday': input should be a valid datetime"),
        ({"currency": "dollars"}, "currency='dollars': string should match pattern"),
        ({"on_demand": {}}, "on_demand={}: dictionary should have at least 1 item"),
        ({"on_demand": {"ml.g5.xlarge": -1}}, "on_demand.ml.g5.xlarge=-1: input should be greater than 0"),
        ({"on_demand": {"ml.g5.xlarge": True}}, "on_demand.ml.g5.xlarge=True: input should be a valid number"),
        ({"on_demand": {"ml.g5.xlarge": "1.76"}}, "on_demand.ml.g5.xlarge='1.76': input should be a valid"),
        (
            {"on_demand": {"ml.g5.xlarge": 1e999}},
            "on_demand.ml.g5.xlarge=inf: input should be a finite number",
        ),
        ({"on_demand": {"g5.xlarge": 1.76}}, "on_demand.g5.xlarge='g5.xlarge': string should match pattern"),
        ({"spot_savings": {"ml.g5.xlarge": 70}}, "spot_savings.ml.g5.xlarge=70: input should be less than 1"),
        ({"spot": {}}, "spot={}: extra inputs are not permitted"),
        ({"version": 2}, "version=2: input should be 1"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(file, change, told):
    content = {**PRICES.model_dump(mode="json"), **change}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        read_prices(file)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file} is no price file ({told}")
    assert problem.endswith(FIX)


def test_a_file_of_something_else_gets_one_sentence_too(file):
    file.write_text('{"model_type": "llama", "vocab_size": 32000}')
    with pytest.raises(UserError) as caught:
        read_prices(file)
    missing = "; ".join(f"{key}: field required" for key in ("region", "asked_at", "currency"))
    assert str(caught.value) == f"{file} is no price file ({missing}; and 3 more{FIX}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read (No such file or directory): give the path of a price file, or ask AWS"),
        ("{", "is not valid JSON (Expecting property name"),
        ("[]", "is no price file (its content=[]: input should be a valid dictionary"),
    ],
)
def test_what_is_no_object_is_refused(file, text, told):
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_prices(file)
    assert str(caught.value).startswith(f"{file} {told}")


def test_the_channel_config_may_hold_the_file(tmp_path, file):
    assert find_price_file(None) is None
    assert find_price_file(tmp_path) is None
    write_prices(PRICES, file)
    assert find_price_file(tmp_path) == file


def test_other_regions_and_prices_of_the_past_and_the_future_are_warned_of():
    def warn(region, days):
        return list(find_warnings(PRICES, region, ASKED_AT + timedelta(days=days)))

    assert warn("eu-central-1", 90) == warn(None, 1) == []
    assert warn("us-east-1", 1) == [
        "The prices are those of eu-central-1, and the job is for us-east-1: ask AWS anew with `llm-trainer plan "
        "--prices --region us-east-1`."
    ]
    (old,) = warn("eu-central-1", 91)
    assert old.startswith("The prices of eu-central-1 are 91 days old: ask AWS anew")
    assert warn("eu-central-1", -1) == []
    assert warn("eu-central-1", -2) == [
        "The prices of eu-central-1 are dated 2026-11-26, which is in the future: check this machine's clock, or ask "
        "AWS anew with `llm-trainer plan --prices --region eu-central-1`."
    ]
