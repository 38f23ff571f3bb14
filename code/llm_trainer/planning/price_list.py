# SPDX-License-Identifier: Apache-2.0
"""AWS's price list, asked by boto3 for what SageMaker's training instances cost in a region."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.planning.prices import (
    FILE_NAME,
    TYPE_NAME,
    Prices,
    find_price_file,
    read_earlier_prices,
    read_prices,
    write_prices,
)

ACTION = "pricing:GetProducts"  # what a role has to be allowed
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 30, 5
THROTTLED = ("ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded")
BAD_CREDENTIALS = (
    *("ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"),
    *("InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature", "MissingAuthenticationToken"),
)
OTHERWISE = "or give prices that were asked elsewhere with --prices-file"


def choose_prices(asks: bool, file: Path | None, region: str | None, config_dir: Path | None) -> Prices | None:
    """Return the prices to plan with: those that AWS tells now, those of a file, or those of the channel `config`.

    With `asks`, AWS is asked. The answer is kept in the file, by default prices.json in the working folder, and the
    savings of an earlier one stay. Return None where there are no prices. Raises UserError.
    """
    if not asks:
        found = file or find_price_file(config_dir)
        return read_prices(found) if found else None
    kept = file or Path(FILE_NAME)
    earlier = read_earlier_prices(kept)
    prices = ask_prices(region)
    if earlier:
        prices = prices.model_copy(update={"spot_savings": earlier.spot_savings})
    write_prices(prices, kept)
    return prices


def ask_prices(region: str | None = None) -> Prices:
    """Return today's prices of a region; None stands for the region of AWS's own settings.

    Raises UserError where AWS cannot be asked, refuses, or has no prices there.
    """
    import boto3  # a quarter of a second, which only those wait for who ask
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    retries = {"total_max_attempts": ATTEMPTS, "mode": "standard"}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    try:
        session = boto3.Session()
        region = region or session.region_name
        if region is None:
            raise UserError("No region is given, and AWS's settings here name none: give --region, or set AWS_REGION.")
        client = session.client("pricing", region_name=choose_endpoint(session, region), config=config)
        return collect_prices(client, region)
    except (BotoCoreError, ClientError) as error:
        raise UserError(explain_refusal(error)) from error


def choose_endpoint(session: Any, region: str) -> str:
    """Return the region in which a region's prices are asked for: the price list is offered in few.

    Raises UserError where none has them.
    """
    from botocore.exceptions import UnknownRegionError

    try:
        endpoints = session.get_available_regions("pricing", session.get_partition_for_region(region))
    except UnknownRegionError as error:
        raise UserError(f"region={region!r} is no region of AWS: give one such as eu-central-1.") from error
    if not endpoints:
        raise UserError(
            f"AWS offers no price list for {region}: write a price file by hand, as docs/planning.md shows."
        )
    continent = region.partition("-")[0]
    return min(endpoints, key=lambda endpoint: (endpoint.partition("-")[0] != continent, endpoint != "us-east-1"))


def collect_prices(client: Any, region: str) -> Prices:
    """Return the prices of a region, from all pages of the price list. Raises UserError where it has none."""
    filters = {"regionCode": region, "productFamily": "ML Instance", "component": "Training"}
    pages = client.get_paginator("get_products").paginate(
        ServiceCode="AmazonSageMaker",
        Filters=[{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in filters.items()],
    )
    rates = list(read_rates(json.loads(product) for page in pages for product in page["PriceList"]))
    if not rates:
        raise UserError(f"AWS's price list has no training instances in region={region!r}: check the region's name.")
    currency = rates[0][1]  # a partition of AWS has one
    on_demand: dict[str, float] = {}
    for name, _, price in rates:
        on_demand[name] = max(price, on_demand.get(name, 0.0))  # where there are two, the plan is not too cheap
    now = datetime.now(UTC).replace(microsecond=0)
    return Prices(region=region, asked_at=now, currency=currency, on_demand=dict(sorted(on_demand.items())))


def read_rates(products: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Yield type, currency and price of an hour for each product that is a training instance.

    Others stand beside them: hosting at other prices, fees of training plans, rows of the free tier at a price of 0.
    """
    for product in products:
        attributes = product["product"]["attributes"]
        name = attributes.get("instanceName", "")
        if not re.search(TYPE_NAME, name) or attributes.get("component") != "Training":
            continue
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                for currency, price in dimension["pricePerUnit"].items():
                    if dimension["unit"] == "Hrs" and float(price) > 0:
                        yield name, currency, float(price)


def explain_refusal(error: Exception) -> str:
    """Return the sentence for an error of boto3: what happened, and what to change."""
    from botocore import exceptions

    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        return f"AWS's price list cannot be reached ({quote_error(error)}): give this machine a network, {OTHERWISE}."
    if not isinstance(error, exceptions.ClientError):  # none, a part, an unknown profile, a login that has ended
        return (
            f"AWS's price list needs credentials ({quote_error(error)}): log in, as with `aws sso login`, or name a "
            f"profile with AWS_PROFILE, {OTHERWISE}."
        )
    code = error.response["Error"]["Code"]
    told = f"{code}: {error.response['Error'].get('Message') or 'no reason is given'}"
    if code.startswith("AccessDenied"):
        return f"AWS's price list may not be read ({told}): allow the role {ACTION}, {OTHERWISE}."
    if code in BAD_CREDENTIALS:
        return f"AWS refuses the credentials for its price list ({told}): renew them, {OTHERWISE}."
    if code in THROTTLED:
        return f"AWS's price list is busy ({told}, {ATTEMPTS} times): ask again in a minute, {OTHERWISE}."
    return f"AWS's price list cannot be read ({told}): ask again later, {OTHERWISE}."
