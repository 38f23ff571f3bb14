# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that plays AWS's price list, for the real boto3; its products have the real ones' shape."""

import json
from typing import Any

from support.fake_json_service import FakeJSONService

PAGE_SIZE = 2
DENIED = (
    "User: arn:aws:iam::111122223333:user/me is not authorized to perform: pricing:GetProducts because no "
    "identity-based policy allows the pricing:GetProducts action"
)


def describe_product(
    name: str, price: str, component: str = "Training", unit: str = "Hrs", currency: str = "USD"
) -> dict[str, Any]:
    """Return a product as GetProducts lists it, in us-east-1."""
    term = {
        "priceDimensions": {
            "2N5VWJ3T3HQK2W6A.JRTCKXETXF.6YS6EN2CT7": {
                "unit": unit,
                "endRange": "Inf",
                "description": f"${price} per {component} {name} hour in US East (N. Virginia)",
                "appliesTo": [],
                "rateCode": "2N5VWJ3T3HQK2W6A.JRTCKXETXF.6YS6EN2CT7",
                "beginRange": "0",
                "pricePerUnit": {currency: price},
            }
        },
        "sku": "2N5VWJ3T3HQK2W6A",
        "effectiveDate": "2026-10-01T00:00:00Z",
        "offerTermCode": "JRTCKXETXF",
        "termAttributes": {},
    }
    attributes = {
        "regionCode": "us-east-1",
        "servicecode": "AmazonSageMaker",
        "platoinstancename": name,
        "platoinstancetype": component,
        "instanceType": f"{name}-{component}",
        "instanceName": name,
        "component": component,
        "computeType": "Accelerated Computing",
        "location": "US East (N. Virginia)",
        "locationType": "AWS Region",
        "usagetype": f"USE1-Train:{name}",
        "operation": "RunInstance",
        "servicename": "Amazon SageMaker",
        "currentGeneration": "Yes",
    }
    return {
        "product": {"productFamily": "ML Instance", "attributes": attributes, "sku": "2N5VWJ3T3HQK2W6A"},
        "serviceCode": "AmazonSageMaker",
        "terms": {"OnDemand": {"2N5VWJ3T3HQK2W6A.JRTCKXETXF": term}},
        "version": "20261020120000",
        "publicationDate": "2026-10-20T12:00:00Z",
    }


class FakePriceList(FakeJSONService):
    """Answers GetProducts with `products`, two a page, whatever the filters. First it gives the `refusals`, by code."""

    def __init__(self) -> None:
        self.products = [describe_product("ml.g5.2xlarge", "1.5150000000")]
        self.refusals: list[str] = []
        self.requests: list[dict[str, Any]] = []
        super().__init__()

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which boto3 asks this server alone."""
        return {
            "AWS_ENDPOINT_URL_PRICING": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": "of-the-test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def answer(self, target: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(asked)
        if self.refusals:
            return 400, {"__type": self.refusals.pop(0), "message": DENIED}
        first = int(asked.get("NextToken", "0"))
        page = self.products[first : first + PAGE_SIZE]
        more = {"NextToken": str(first + PAGE_SIZE)} if self.products[first + PAGE_SIZE :] else {}
        return 200, {"FormatVersion": "aws_v1", "PriceList": [json.dumps(product) for product in page], **more}
