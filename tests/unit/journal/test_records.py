# SPDX-License-Identifier: Apache-2.0
"""A record keeps what its type does not name, and old or newer journals stay readable."""

import json
from typing import get_args

import pytest

from llm_trainer.journal.records import KINDS, Record, RecordKind, parse_record


@pytest.mark.parametrize("kind", get_args(RecordKind))
def test_every_field_of_a_record_is_kept_also_those_of_a_newer_version(kind):
    fields = {"time": 1.5, "kind": kind, "host": "algo-1", "of_a_newer_version": {"a": [1, None]}}
    assert parse_record(json.loads(json.dumps(fields))) == fields


def test_a_record_of_an_unknown_kind_is_none():
    assert parse_record({"time": 1.5, "kind": "of a newer version"}) is None
    assert parse_record({"time": 1.5}) is None


def test_every_kind_has_a_type():
    assert len(get_args(Record)) == len(KINDS) == 12


def test_a_column_of_gpus_is_read_as_a_name_for_each():
    fields = {"time": 1.5, "kind": "system", "host": "algo-1", "gpus": {"power_watts": [1.5, None, 3]}}
    record = parse_record(fields)
    assert record["values"] == {"gpu/algo-1/0/power_watts": 1.5, "gpu/algo-1/2/power_watts": 3}
    assert "gpus" not in record
