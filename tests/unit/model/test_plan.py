# SPDX-License-Identifier: Apache-2.0
"""A model's plan is made from its config, with the reasons for the log, and every contradiction is told at once."""

import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.plan import PlanSettings, plan_model
from llm_trainer.model.precision import Precision, choose_precision

CPU = Device(torch.device("cpu"))


def plan(folder, **options):
    given = Settings(**options)
    precision = choose_precision(given.model, given.adapter, CPU)
    return plan_model(
        str(folder), PlanSettings(given.model, given.adapter, given.parallelism, given.output), CPU, precision
    )


def test_an_adapter_is_planned_on_the_whole_base(tiny_model):
    planned = plan(tiny_model, lora_r=4)
    assert planned.lora.r == 4
    assert planned.quantization is None
    assert isinstance(planned.precision, Precision)
    assert planned.load_options.weights_dtype == planned.precision.weights
    assert any(line.startswith("Attention: sdpa") for line in planned.reasons)
    assert len(planned.reasons) >= 3


def test_full_fine_tuning_has_no_adapter(tiny_model):
    assert plan(tiny_model, use_peft=False).lora is None


def test_a_kernel_that_cannot_run_here_is_refused(tiny_model):
    with pytest.raises(UserError, match="attn_implementation=flash_attention_2"):
        plan(tiny_model, attn_implementation="flash_attention_2")


def test_a_base_in_4_bit_is_planned_with_its_quantization_and_told(tiny_model):
    pytest.importorskip("bitsandbytes")
    planned = plan(tiny_model, load_in_4bit=True)
    assert planned.quantization is not None
    assert planned.load_options.quantization is planned.quantization
    assert any(line.startswith("Quantization: ") for line in planned.reasons)
