# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server that plays AWS's price list, for the real boto3; its products have the real ones' shape."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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


class FakePriceList:
    """Answers GetProducts with `products`, two a page, whatever the filters. First it gives the `refusals`, by code."""

    def __init__(self) -> None:
        self.products = [describe_product("ml.g5.2xlarge", "1.5150000000")]
        self.refusals: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.regions: list[str] = []  # of the endpoints that were asked
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.regions.append(self.headers["Authorization"].split("/")[2])
                status, answer = fake.answer(asked)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which boto3 asks this server alone."""
        return {
            "AWS_ENDPOINT_URL_PRICING": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": "of-the-test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def answer(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(asked)
        if self.refusals:
            return 400, {"__type": self.refusals.pop(0), "message": DENIED}
        first = int(asked.get("NextToken", "0"))
        page = self.products[first : first + PAGE_SIZE]
        more = {"NextToken": str(first + PAGE_SIZE)} if self.products[first + PAGE_SIZE :] else {}
        return 200, {"FormatVersion": "aws_v1", "PriceList": [json.dumps(product) for product in page], **more}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
