# SPDX-License-Identifier: Apache-2.0
"""A job stands beside its plan, whatever machine it ran on, and nothing there costs its result."""

import pytest
import torch

from llm_trainer.model.device import Device
from llm_trainer.planning.comparison import (
    Figures,
    compare_with_plan,
    describe_comparison,
    find_host,
    read_prices_beside,
)
from llm_trainer.planning.instances import read_instances
from support.planned_jobs import PRICES, outline_job

CPU = Device(torch.device("cpu"))
G5 = read_instances().types["ml.g5.xlarge"]


def test_a_host_is_found_by_its_type_else_by_its_gpu():
    a10g = Device(torch.device("cuda"), "NVIDIA A10G", (8, 6))
    assert find_host("ml.g5.xlarge", a10g, 1) == G5
    here = find_host(None, a10g, 2)
    assert (here.gpu, here.num_gpus, here.name) == (G5.gpu, 2, "this machine")
    cpu = find_host("ml.c5.xlarge", CPU, 2)
    assert (cpu.gpu.name, cpu.num_gpus, cpu.name) == ("CPU", 2, "ml.c5.xlarge")
    assert cpu.gpu.peak_flops == pytest.approx(find_host(None, CPU, 1).gpu.peak_flops / 2)
    assert find_host(None, Device(torch.device("cuda"), "a GPU of next year", (15, 0)), 1) is None


def test_planned_and_actual_have_the_same_figures():
    outline = outline_job(lengths={100: 1000}, prices=PRICES)
    fit = outline.fitter.fit(G5.gpu, 1)
    compared = compare_with_plan(outline, G5, 1, fit, Figures(2**30, 0.5, 20.0, 2.0))
    assert compared["planned"].keys() - compared["actual"].keys() == {"steps"}
    assert compared["planned"]["memory_bytes"] == fit.need.peak_bytes
    assert compared["actual"]["dollars"] == pytest.approx(2 * 1.4)
    line = describe_comparison(compared)
    assert line.startswith("Planned and actual: memory ")
    assert " and 1 GiB; a step " in line
    assert line.endswith(" and 2 h")
    alone = compare_with_plan(outline, G5, 1, fit, Figures(2**30, None, 20.0, 2.0))
    assert "a step" not in describe_comparison(alone)


def test_a_price_file_that_is_wrong_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert read_prices_beside(None) is None
    (tmp_path / "prices.json").write_text("[]")
    assert read_prices_beside(tmp_path) is None
    assert "is no price file" in capsys.readouterr().out
    (tmp_path / "prices.json").write_text(PRICES.model_dump_json())
    assert read_prices_beside(tmp_path) == PRICES
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert read_prices_beside(tmp_path) == PRICES
    assert "The prices are those of us-east-1, and the job is for eu-west-3: " in capsys.readouterr().out
