# SPDX-License-Identifier: Apache-2.0
"""AWS's price list: what is read of its answers, and one sentence for each way in which it does not answer."""

import json

import boto3
import pytest
from botocore.stub import Stubber

from llm_trainer.aws.clients import open_client
from llm_trainer.aws.price_list import ask_prices, choose_endpoint, choose_prices, collect_prices, read_rates
from llm_trainer.common.errors import UserError
from llm_trainer.planning.prices import read_prices, write_prices
from support.fake_price_list import FakePriceList, describe_product

REGIONS = {
    "eu-west-3": "eu-central-1", "ap-south-1": "ap-south-1", "us-west-2": "us-east-1", "sa-east-1": "us-east-1",
    "us-gov-west-1": "us-east-1",
}  # fmt: skip


@pytest.fixture
def price_list(monkeypatch):
    fake = FakePriceList()
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in fake.variables.items():
        monkeypatch.setenv(name, value)
    open_client.cache_clear()
    yield fake
    open_client.cache_clear()
    fake.close()


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *arguments: 0)
    # What a throttled client waits for before it sends at all, in the adaptive mode.
    monkeypatch.setattr("botocore.retries.adaptive.ClientRateLimiter.on_sending_request", lambda *_, **__: None)


def refuse(region="us-east-1"):
    """Return what is told before the way that all refusals leave open."""
    with pytest.raises(UserError) as caught:
        ask_prices(region)
    (problem,) = caught.value.problems
    told, way, rest = problem.partition(", or give prices that were asked elsewhere with --prices-file.")
    assert (bool(way), rest) == (True, "")
    return told


def test_all_pages_are_read():
    client = boto3.client("pricing", "us-east-1", aws_access_key_id="key", aws_secret_access_key="of-the-test")
    filters = {"regionCode": "us-east-1", "productFamily": "ML Instance", "component": "Training"}
    asked = {
        "ServiceCode": "AmazonSageMaker",
        "Filters": [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters.items()],
    }
    pages = [("ml.p4d.24xlarge", "25.2510000000"), ("ml.g5.2xlarge", "1.5150000000")]
    with Stubber(client) as stubber:
        for (name, price), token in zip(pages, ("more", None), strict=True):
            answer = {"FormatVersion": "aws_v1", "PriceList": [json.dumps(describe_product(name, price))]}
            answer |= {"NextToken": token} if token else {}
            stubber.add_response("get_products", answer, asked)
            asked = asked | {"NextToken": "more"}
        prices = collect_prices(client, "us-east-1")
        stubber.assert_no_pending_responses()
    assert prices.on_demand == {"ml.g5.2xlarge": 1.515, "ml.p4d.24xlarge": 25.251}
    assert (prices.region, prices.currency) == ("us-east-1", "USD")


def test_only_hours_of_training_instances_count():
    fee = describe_product("ml.p4d.24xlarge", "13.57", unit="Quantity")
    reserved = {**describe_product("ml.p5.48xlarge", "1"), "terms": {"Reserved": {}}}
    training = {**describe_product("ml.g5.xlarge", "1.408")}
    nameless = describe_product("", "3.0", component="ServerlessTraining:FineTuning")
    del nameless["product"]["attributes"]["instanceName"]
    strange = describe_product("ml.g5.xlarge, in a block", "1.2")
    others = [describe_product("ml.p4d.24xlarge", "25.91", component="Cluster"), fee, reserved, nameless, strange]
    free = describe_product("ml.g5.xlarge", "0.0000000000")
    assert list(read_rates([*others, free, training])) == [("ml.g5.xlarge", "USD", 1.408)]


def test_the_usage_type_names_what_has_no_other_name():
    product = describe_product("ml.g5.xlarge", "1.408")
    for name in ("", "NA"):
        product["product"]["attributes"]["instanceName"] = name
        assert list(read_rates([product])) == [("ml.g5.xlarge", "USD", 1.408)]


def test_reserved_terms_and_other_components_cost_nothing_here(price_list):
    reserved = describe_product("ml.p5.48xlarge", "40.0")
    reserved["terms"]["Reserved"] = describe_product("ml.p5.48xlarge", "99.0")["terms"]["OnDemand"]
    others = [
        describe_product("ml.p5.48xlarge", "70.0", component) for component in ("Hosting", "Notebook", "SpotTraining")
    ]
    price_list.products = [*others, reserved, describe_product("ml.p4d.24xlarge", "180.0", currency="CNY")]
    prices = ask_prices("us-east-1")
    assert (prices.currency, prices.on_demand) == ("USD", {"ml.p5.48xlarge": 40.0})


def test_a_product_may_have_several_price_dimensions():
    product = describe_product("ml.g5.xlarge", "1.408")
    ((_, term),) = product["terms"]["OnDemand"].items()
    (hour,) = term["priceDimensions"].values()
    term["priceDimensions"] |= {
        "free": {**hour, "endRange": "50", "pricePerUnit": {"USD": "0.0000000000"}},
        "fee": {**hour, "unit": "Quantity", "pricePerUnit": {"USD": "500"}},
    }
    assert list(read_rates([product])) == [("ml.g5.xlarge", "USD", 1.408)]


def test_of_two_prices_the_higher_counts(price_list):
    price_list.products = [describe_product("ml.g5.xlarge", price) for price in ("1.2", "1.408", "1.3")]
    assert ask_prices("us-east-1").on_demand == {"ml.g5.xlarge": 1.408}


def test_another_partition_has_its_own_currency(price_list):
    price_list.products = [describe_product("ml.g4dn.xlarge", "7.5", currency="CNY")]
    assert ask_prices("cn-north-1").currency == "CNY"
    assert price_list.regions == ["cn-northwest-1"]


@pytest.mark.parametrize(("region", "endpoint"), REGIONS.items())
def test_the_nearest_endpoint_is_asked(region, endpoint):
    assert choose_endpoint(region) == endpoint


def test_the_region_comes_from_awss_settings(price_list, monkeypatch):
    assert refuse(None).startswith("No AWS region is set")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert ask_prices().region == "eu-west-1"
    assert price_list.regions == ["eu-central-1"]


def test_a_busy_price_list_is_asked_again(price_list, no_waits):
    price_list.refusals = ["ThrottlingException", "ThrottlingException"]
    assert ask_prices("us-east-1").on_demand == {"ml.g5.2xlarge": 1.515}
    price_list.refusals = ["ThrottlingException"] * 5
    assert refuse().startswith("AWS throttles GetProducts")
    assert len(price_list.requests) == 3 + 5


def test_a_refusal_names_the_action(price_list):
    price_list.refusals = ["AccessDeniedException"]
    assert refuse().startswith("arn:aws:iam::111122223333:user/me may not do pricing:GetProducts: allow it that action")


def test_govcloud_is_asked_with_a_commercial_account(price_list):
    assert ask_prices("us-gov-west-1").region == "us-gov-west-1"
    price_list.refusals = ["UnrecognizedClientException"]
    with pytest.raises(UserError) as caught:
        ask_prices("us-gov-west-1")
    assert str(caught.value).endswith("; GovCloud's prices are asked with credentials of a commercial account.")
    assert price_list.regions == ["us-east-1", "us-east-1"]


def test_an_ended_login_is_renewed(price_list):
    price_list.refusals = ["ExpiredTokenException"]
    assert refuse().startswith("The AWS credentials have expired: ")


def test_another_fault_is_quoted(price_list, no_waits):
    price_list.refusals = ["InvalidParameterException"]
    assert refuse().startswith("AWS refuses GetProducts (InvalidParameterException: User: ")


def test_without_credentials_the_login_is_named(price_list, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refuse().startswith("No AWS credentials were found here: ")


def test_an_unknown_profile_is_named(price_list, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "The config profile (nobody) could not be found" in refuse()


def test_without_a_network_the_file_is_named(price_list, no_waits):
    price_list.close()
    assert "Could not connect to the endpoint URL" in refuse()


def test_regions_that_have_no_prices(price_list):
    assert refuse("frankfurt") == "region='frankfurt' is no region of AWS: give one such as eu-central-1"
    price_list.products = []
    assert refuse("eu-central-9") == (
        "AWS's price list has no training instances in region='eu-central-9': check the region's name"
    )


def test_what_was_asked_is_kept_and_found_again(price_list, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = choose_prices(True, None, "us-east-1", None)
    assert read_prices(tmp_path / "prices.json") == asked
    assert choose_prices(False, None, None, tmp_path) == asked
    assert choose_prices(True, tmp_path / "mine.json", "us-east-1", None) == read_prices(tmp_path / "mine.json")
    assert choose_prices(False, tmp_path / "mine.json", None, None).region == "us-east-1"
    assert choose_prices(False, None, None, None) is None
    assert len(price_list.requests) == 2


def test_what_the_user_wrote_into_the_file_stays(price_list, tmp_path):
    file = tmp_path / "prices.json"
    known = choose_prices(True, file, "us-east-1", None).model_copy(update={"spot_savings": {"ml.g5.2xlarge": 0.7}})
    write_prices(known, file)
    assert choose_prices(True, file, "us-west-2", None).spot_savings == {"ml.g5.2xlarge": 0.7}
    assert read_prices(file).region == "us-west-2"


def test_no_other_file_is_overwritten(price_list, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"model_id": "mine"}')
    with pytest.raises(UserError) as caught:
        choose_prices(True, file, "us-east-1", None)
    assert str(caught.value) == (
        f"{file} is there, and holds no prices: remove it, or name another file with --prices-file."
    )
    assert file.read_text() == '{"model_id": "mine"}'
    assert price_list.requests == []
