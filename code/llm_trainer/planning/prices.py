# SPDX-License-Identifier: Apache-2.0
"""Prices of instances, as AWS told them once: a dated file that is passed on. None are shipped.

`aws/price_list.py` asks AWS. The file lies where the user wants it, or as prices.json in the channel `config`.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llm_trainer.common.bounded_parsing import UnreadableTextError, read_json
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.common.files import write_json
from llm_trainer.config.environment import PRICE_FILE

FILE_NAME = PRICE_FILE
MAX_AGE = timedelta(days=90)
CLOCK_SKEW = timedelta(days=1)  # between the machine that asked and this one
MAX_TOLD_FAULTS = 3  # a file of something else has many
# SageMaker publishes no prices of spot instances, only that they save up to 90 %. This is assumed, and told as such.
ASSUMED_SPOT_SAVING = 0.5

TYPE_NAME = r"^ml\.[a-z0-9-]+\.[a-z0-9]+$"
TypeName = Annotated[str, Field(pattern=TYPE_NAME)]
Price = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]


class Prices(BaseModel):
    """The price of an hour of each instance type in a region."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1  # of the file's format
    region: str = Field(min_length=1)
    asked_at: AwareDatetime
    currency: str = Field(pattern="^[A-Z]{3}$")
    on_demand: dict[TypeName, Price] = Field(min_length=1)
    spot_savings: dict[TypeName, Share] = {}  # a user's own experience, as a share of the price on demand

    @property
    def spot(self) -> dict[str, float]:
        """The price of an hour on spot by type: the one on demand less the saving that is known or assumed."""
        return {name: price * (1 - self.find_spot_saving(name)) for name, price in self.on_demand.items()}

    def find_spot_saving(self, name: str) -> float:
        """Return the share of a type's price that spot saves, as it is known or assumed."""
        return self.spot_savings.get(name, ASSUMED_SPOT_SAVING)

    @property
    def origin(self) -> str:
        """The place and the date, to be shown beside the prices."""
        return f"prices of {self.region} in {self.currency}, asked on {self.asked_at:%Y-%m-%d}"


def write_prices(prices: Prices, file: Path) -> None:
    """Write a price file, whole or not at all. Raises UserError where it cannot be written."""
    try:
        write_json(file, prices.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file for the prices.") from error


def read_prices(file: Path) -> Prices:
    """Return the prices in a file. Raises UserError."""
    try:
        content = read_json(file)
    except UnreadableTextError as error:
        raise UserError(f"{file} {error.reason}: give the path of a price file, or {say_ask_anew()}.") from error
    try:
        return Prices.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(describe_faults(error))
        raise UserError(f"{file} is no price file ({faults}): {say_ask_anew()}.") from error


def describe_faults(error: ValidationError) -> Iterator[str]:
    """Yield what is wrong in a price file: the first places, and how many more there are."""
    faults = error.errors(include_url=False)
    for fault in faults[:MAX_TOLD_FAULTS]:
        place = ".".join(str(part) for part in fault["loc"] if part != "[key]") or "its content"
        given = "" if fault["type"] == "missing" else f"={cut_quote(repr(fault['input']))}"
        yield f"{place}{given}: {fault['msg'].lower()}"
    if len(faults) > MAX_TOLD_FAULTS:
        yield f"and {len(faults) - MAX_TOLD_FAULTS} more"


def read_earlier_prices(file: Path) -> Prices | None:
    """Return the prices in a file that is to be written anew, None where there is none.

    Raises UserError where it holds something else, which is not to be lost.
    """
    if not os.path.exists(file):
        return None
    try:
        return read_prices(file)
    except UserError as error:
        raise UserError(
            f"{file} is there, and holds no prices: remove it, or name another file with --prices-file."
        ) from error


def find_price_file(config_dir: Path | None) -> Path | None:
    """Return the price file in the folder of the channel `config`, or None where there is none."""
    file = config_dir / FILE_NAME if config_dir else None
    return file if file and os.path.exists(file) else None


def find_warnings(prices: Prices, region: str | None, now: datetime | None = None) -> Iterator[str]:
    """Yield a sentence for prices of another region than the job's, for old ones, and for those of the future.

    None stands for a region that is not known.
    """
    if region and region != prices.region:
        yield f"The prices are those of {prices.region}, and the job is for {region}: {say_ask_anew(region)}."
    age = (now or datetime.now(UTC)) - prices.asked_at
    if age > MAX_AGE:
        yield f"The prices of {prices.region} are {age.days} days old: {say_ask_anew(prices.region)}."
    if age < -CLOCK_SKEW:
        yield (
            f"The prices of {prices.region} are dated {prices.asked_at:%Y-%m-%d}, which is in the future: check this "
            f"machine's clock, or {say_ask_anew(prices.region)}."
        )


def say_ask_anew(region: str = "") -> str:
    """Return the end of a sentence that has a user ask for prices again."""
    command = f"llm-trainer plan --prices{region and f' --region {region}'}"
    return f"ask AWS anew with `{command}`"
