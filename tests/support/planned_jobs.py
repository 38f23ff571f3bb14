# SPDX-License-Identifier: Apache-2.0
"""Jobs of a tiny model that are planned for instances."""

import torch
from transformers import LlamaConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model.device import Device
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
from llm_trainer.planning.candidates import Outline
from llm_trainer.planning.fitting import Fitter
from llm_trainer.planning.learning import Learnt
from llm_trainer.planning.prices import Prices
from llm_trainer.planning.workload import measure_work

TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
PRICES = Prices.model_validate(
    {
        "region": "us-east-1",
        "asked_at": "2026-11-26T00:00:00Z",
        "currency": "USD",
        "on_demand": {"ml.g5.xlarge": 1.4, "ml.g5.12xlarge": 7.0, "ml.p4d.24xlarge": 25.0},
    }
)


def outline_job(config=TINY, lengths=None, prices=None, learnt=None, **settings):
    """A job with an adapter, whose rows have these lengths; without any, nothing is known of them."""
    settings = {"max_length": 128, "per_device_train_batch_size": 2, "lora_dropout": 0.0, **settings}
    given = Settings(**{name: value for name, value in settings.items() if value is not None})
    sections = MemorySettings(given.model, given.adapter, given.data, given.training, given.parallelism, given.methods)
    target = Target(Device(torch.device("cuda"), "a GPU", (9, 0)), 1, 0)
    scenario = MemoryScenario(config, sections, 128, target, "flash_attention_2")
    work = measure_work(lengths, {}, given) if lengths else None
    return Outline(Fitter(scenario), work, False, learnt or Learnt(), prices)
