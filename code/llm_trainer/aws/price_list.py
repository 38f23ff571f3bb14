# SPDX-License-Identifier: Apache-2.0
"""AWS's price list, asked by boto3 for what SageMaker's training instances cost in a region."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_trainer.aws.clients import find_region, open_client
from llm_trainer.aws.refusals import explain_refusals
from llm_trainer.common.errors import UserError
from llm_trainer.planning.prices import (
    FILE_NAME,
    TYPE_NAME,
    Prices,
    find_price_file,
    read_earlier_prices,
    read_prices,
    write_prices,
)

OTHERWISE = "or give prices that were asked elsewhere with --prices-file"
OTHER_ACCOUNT = "GovCloud's prices are asked with credentials of a commercial account"


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
    try:
        with explain_refusals():
            region = region or find_region()
            return collect_prices(open_client("pricing", choose_endpoint(region)), region)
    except UserError as error:
        way = f"{OTHERWISE}; {OTHER_ACCOUNT}" if (region or "").startswith("us-gov-") else OTHERWISE
        raise UserError(*(f"{problem.removesuffix('.')}, {way}." for problem in error.problems)) from error


def choose_endpoint(region: str) -> str:
    """Return the region in which a region's prices are asked for: the price list is offered in few.

    Raises UserError for a region that is none.
    """
    import boto3
    from botocore.exceptions import UnknownRegionError

    session = boto3.Session()
    try:
        endpoints = session.get_available_regions("pricing", session.get_partition_for_region(region))
    except UnknownRegionError as error:
        raise UserError(f"region={region!r} is no region of AWS: give one such as eu-central-1.") from error
    # A partition without a price list, which is GovCloud, stands in the one of the commercial regions.
    endpoints = endpoints or session.get_available_regions("pricing")
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
    for name, unit, price in rates:
        if unit == currency:
            on_demand[name] = max(price, on_demand.get(name, 0.0))  # where there are two, the plan is not too cheap
    now = datetime.now(UTC).replace(microsecond=0)
    return Prices(region=region, asked_at=now, currency=currency, on_demand=dict(sorted(on_demand.items())))


def read_rates(products: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Yield type, currency and price of an hour for each product that is a training instance.

    Others stand beside them: hosting at other prices, fees of training plans, rows of the free tier at a price of 0.
    """
    for product in products:
        attributes = product["product"]["attributes"]
        name = find_type(attributes)
        if name is None or attributes.get("component") != "Training":
            continue
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                for currency, price in dimension["pricePerUnit"].items():
                    if dimension["unit"] == "Hrs" and float(price) > 0:
                        yield name, currency, float(price)


def find_type(attributes: Mapping[str, str]) -> str | None:
    """Return the instance type of a product by its attributes, None where it is of none.

    Some products have no `instanceName`: their usage type ends in it, as in `USE1-Train:ml.g5.xlarge`.
    """
    names = (attributes.get("instanceName", ""), attributes.get("usagetype", "").rpartition(":")[2])
    return next((name for name in names if re.search(TYPE_NAME, name)), None)
