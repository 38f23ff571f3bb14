# SPDX-License-Identifier: Apache-2.0
"""Every recipe of examples/recipes/ is free of mistakes, and its model fits the instance that it names, as it says."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GptOssConfig, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3VLConfig

from llm_trainer.aws.options import read_options
from llm_trainer.common.units import GIB
from llm_trainer.config.checks import count_devices, find_missing_hardware
from llm_trainer.config.environment import Environment
from llm_trainer.config.global_batch import find_batch_problem
from llm_trainer.config.load import JOB_SECTION, read_settings
from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import ALIASES
from llm_trainer.config.teacher import derive_teacher
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.device import Device
from llm_trainer.model.memory.fit import choose_kernels, choose_memory_plan
from llm_trainer.model.memory.global_batch import split_global_batch
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
from llm_trainer.model.teacher.teacher import Teacher
from support.environments import build_environment

RECIPES = sorted((Path(__file__).parents[3] / "examples/recipes").glob("*.yaml"))
CPU = Device(torch.device("cpu"))
OF_AN_ACCOUNT = {"image": "trainer:cuda", "role": "Trainer", "output": "s3://bucket/output"}


def gpu(name: str, capability: tuple[int, int]) -> Device:
    return Device(torch.device("cuda"), name, capability, is_here=False)


@dataclass(frozen=True)
class Instance:
    device: Device
    num_gpus: int
    free_gib: float  # of a GPU as torch finds it, with a CUDA context on it; without GPUs, of the host


L4, L40S, A100, H100 = gpu("L4", (8, 9)), gpu("L40S", (8, 9)), gpu("A100", (8, 0)), gpu("H100", (9, 0))
INSTANCES = {
    "ml.c7i.4xlarge": Instance(CPU, 0, 28),
    "ml.g6.2xlarge": Instance(L4, 1, 21.5),
    "ml.g6.12xlarge": Instance(L4, 4, 21.5),
    "ml.g6e.12xlarge": Instance(L40S, 4, 43.9),
    "ml.p4d.24xlarge": Instance(A100, 8, 38.9),
    "ml.p5.4xlarge": Instance(H100, 1, 78.6),
    "ml.p5.48xlarge": Instance(H100, 8, 78.6),
}


def llama(hidden: int, intermediate: int, layers: int, heads: int, **options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=options.pop("vocab_size", 128256),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=options.pop("num_key_value_heads", 8),
        **options,
    )


def qwen3(hidden: int, intermediate: int, layers: int, heads: int, is_tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=is_tied,
    )


# The sizes are those of the models' own config.json.
CONFIGS: dict[str, PreTrainedConfig] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama(
        576, 1536, 30, 9, vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-1.7B": qwen3(2048, 6144, 28, 16, is_tied=True),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32, is_tied=True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-VL-4B-Instruct": Qwen3VLConfig(
        text_config={
            **qwen3(2560, 9728, 36, 32, is_tied=True).to_dict(),
            "model_type": "qwen3_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        vision_config={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
        | {"deepstack_visual_indexes": [5, 11, 17]},
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64),
    "openai/gpt-oss-20b": GptOssConfig(
        num_hidden_layers=24, num_local_experts=32, quantization_config={"quant_method": "mxfp4"}
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for and claims, and the settings below that."""

    path: Path
    num_instances: int
    instance: Instance
    memory: str

    def read_settings(self) -> tuple[Settings, list[str]]:
        return read_settings(self.build_environment(), {})

    def build_environment(self) -> Environment:
        hosts = tuple(f"algo-{number + 1}" for number in range(self.num_instances))
        return build_environment(
            channels={"config": self.path},
            hosts=hosts,
            current_host=hosts[0],
            num_gpus=self.instance.num_gpus,
            num_cpus=16,
        )


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> Recipe:
    text = request.param.read_text(encoding="utf-8")
    problems: list[str] = []
    options = read_options({**yaml.safe_load(text)["job"], **OF_AN_ACCOUNT}, problems)
    assert problems == []
    memory = re.search(r"^# Memory: (.*)$", text, re.MULTILINE)[1]
    return Recipe(request.param, options.instance_count, INSTANCES[options.instance_type], memory)


def draw_images(settings: Settings) -> RowImages | None:
    """Return what Qwen3-VL's processor makes of so many images of 1280 x 960 pixels: patches of 16 pixels, twice."""
    if settings.data.max_images_per_row is None:
        return None
    grid = torch.tensor([[1, 60, 80]] * settings.data.max_images_per_row)
    patches = torch.empty(int(grid.prod(dim=1).sum()), 2 * 3 * 16**2, device="meta")
    return RowImages({"pixel_values": patches, "image_grid_thw": grid})


def describe_teacher(settings: Settings) -> Teacher | None:
    """Return the teacher of a recipe by its config, None where it has none."""
    theirs = derive_teacher(settings.model, settings.methods, {})
    return Teacher("", CONFIGS[theirs.model_id], theirs, skeleton=None) if theirs.model_id else None


def test_there_are_recipes():
    assert len(RECIPES) >= 9


def test_its_settings_are_valid_together_and_on_its_instance(recipe):
    settings, problems = recipe.read_settings()
    environment = recipe.build_environment()
    num_devices = count_devices(settings.parallelism, environment)
    problems += find_batch_problem(settings.training, settings.data, num_devices)
    assert [*problems, *find_missing_hardware(settings, environment)] == []
    given = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    assert {ALIASES.get(name, name) for name in given} == settings.given.keys() | {JOB_SECTION}


def test_its_model_fits_its_instance_in_the_way_that_it_says(recipe):
    settings, _ = recipe.read_settings()
    instance = recipe.instance
    target = Target(instance.device, max(1, instance.num_gpus) * recipe.num_instances, int(instance.free_gib * GIB))
    config = CONFIGS[settings.model.model_id]
    work = settings.data, settings.training, settings.parallelism, settings.methods
    sections = MemorySettings(settings.model, settings.adapter, *work)
    teacher = describe_teacher(settings)
    scenario = MemoryScenario(config, sections, settings.data.max_length, target, "eager", teacher=teacher)
    scenario = replace(scenario, images=draw_images(settings))
    fit = choose_memory_plan(split_global_batch(choose_kernels(scenario)))
    way = fit.parallelism.describe(target.world_size).partition(" with ")[2]
    size = f"{fit.estimate.total_bytes / GIB:.0f} GiB a {target.unit}"
    assert recipe.memory == (f"{size}, with {way}" if way else size)
