# SPDX-License-Identifier: Apache-2.0
"""How a job fits GPUs that are not here is how it would fit them there."""

import pytest
import torch

from llm_trainer.common.errors import UserError
from llm_trainer.model.memory.fit import choose_memory_plan
from llm_trainer.model.memory.gpus import read_gpus
from llm_trainer.model.memory.shape import UnknownShapeError
from llm_trainer.planning import fitting
from support.planned_jobs import outline_job

GPUS = read_gpus()


def test_the_way_is_the_one_that_the_job_will_choose():
    fitter = outline_job().fitter
    fit = fitter.fit(GPUS["A10G"], 4)
    chosen = choose_memory_plan(fit.scenario)
    assert (fit.plan, fit.need) == (chosen.parallelism, chosen.estimate)
    assert fit.fits
    assert not fit.refusal
    assert fitter.fit(GPUS["A10G"], 8).scenario.shape is fit.scenario.shape


def test_what_a_gpu_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"base_compute=fp8: A10G \(8\.6\) cannot multiply in float8"):
        outline_job(base_compute="fp8").fitter.fit(GPUS["A10G"], 1)
    with pytest.raises(UserError, match="flash_attention_2 is not made for T4"):
        outline_job(attn_implementation="flash_attention_2").fitter.fit(GPUS["T4"], 1)
    with pytest.raises(UserError, match="torch_dtype=bfloat16"):
        outline_job(torch_dtype="bfloat16").fitter.fit(GPUS["T4"], 1)
    for name, kind in (("bf16", "bfloat16"), ("bf16_full_eval", "bfloat16"), ("tf32", "TF32")):
        asked = outline_job(**{name: True}).fitter
        with pytest.raises(UserError, match=rf"{name}=true: T4 \(7\.5\) has no {kind}"):
            asked.fit(GPUS["T4"], 1)
        assert asked.fit(GPUS["A10G"], 1).fits
        assert outline_job(**{name: False}).fitter.fit(GPUS["T4"], 1).fits
    with pytest.raises(UserError, match="global_batch_size=6 cannot be shared by 4 devices"):
        outline_job(global_batch_size=6, per_device_train_batch_size=1).fitter.fit(GPUS["A10G"], 4)


def test_a_gpu_without_bfloat16_computes_in_float16_and_shares_the_shape():
    fitter = outline_job().fitter
    new, old = (fitter.fit(GPUS[name], 1).scenario for name in ("A10G", "T4"))
    assert (new.dtypes[1], old.dtypes[1]) == (torch.bfloat16, torch.float16)
    assert (new.attention, old.attention) == ("flash_attention_2", "sdpa")
    assert old.shape is new.shape
    assert old.traced_dtype == new.traced_dtype == torch.bfloat16


def test_a_model_that_cannot_be_traced_is_planned_by_formula(monkeypatch):
    def refuse(scenario):
        raise UnknownShapeError("its code asks for numbers")

    monkeypatch.setattr(fitting, "try_plans", refuse)
    found = outline_job().fitter.fit(GPUS["A10G"], 1)
    assert found.by_formula
    assert found.fits
