# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.global_batch import (
    describe_batch,
    describe_smaller_pieces,
    find_batch_problem,
    find_global_batch,
    list_device_batches,
)
from llm_trainer.config.schema import Settings

PACKED = {"packing": True, "max_length": 512}


def list_problems(num_devices, **values):
    settings = Settings(**values)
    return [*find_contradictions(settings), *find_batch_problem(settings.training, settings.data, num_devices)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"global_batch_size": 30}, "global_batch_size=30 cannot be shared by 4 devices: give 28 or 32."),
        ({"global_batch_size": 3}, "global_batch_size=3 cannot be shared by 4 devices: give 4."),
        (
            {"global_batch_size": 32, "per_device_train_batch_size": 3},
            "global_batch_size=32 cannot be shared by 4 devices x per_device_train_batch_size=3: give 24 or 36.",
        ),
        (
            {"global_batch_size": 32, "gradient_accumulation_steps": 3},
            "global_batch_size=32 cannot be shared by 4 devices x gradient_accumulation_steps=3: give 24 or 36.",
        ),
        (
            {"global_batch_tokens": 32 * 512, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
            | PACKED,
            "global_batch_tokens=16384 is not 4 devices x per_device_train_batch_size=4 x "
            "gradient_accumulation_steps=4 = 32768: change one of them, or leave one out.",
        ),
        ({"global_batch_size": 1}, "global_batch_size=1 cannot be shared by 4 devices: give 4."),
        (
            {"global_batch_size": 999983},
            "global_batch_size=999983 cannot be shared by 4 devices: give 999980 or 999984.",
        ),
        ({"global_batch_tokens": 300, **PACKED}, "global_batch_tokens=300 is no multiple of max_length=512: give 512."),
        (
            {"global_batch_size": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            "global_batch_size=32 is not 4 devices x per_device_train_batch_size=4 x gradient_accumulation_steps=4 "
            "= 64: change one of them, or leave one out.",
        ),
        (
            {"global_batch_tokens": 5120, **PACKED},
            "global_batch_tokens=5120 cannot be shared by 4 devices: give 4096 or 6144.",
        ),
        (
            {"global_batch_tokens": 4100, **PACKED},
            "global_batch_tokens=4100 is no multiple of max_length=512: give 4096 or 4608.",
        ),
    ],
)
def test_a_batch_that_devices_cannot_share_is_told_with_the_nearest_ones(values, problem):
    assert list_problems(4, **values) == [problem]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_batch_size": 8, "global_batch_tokens": 4096, **PACKED}, "both say how large a step is"),
        (
            {"global_batch_tokens": 4096, "packing": True},
            "without packing=true and max_length",
        ),
        ({"global_batch_tokens": 4096}, "without packing=true and max_length"),
        ({"global_batch_size": 8, "dataloader_drop_last": True}, "which rows it drops would depend on the devices"),
        ({"global_batch_size": 8, "auto_find_batch_size": True}, "it would lower the rows of a step"),
        ({"global_batch_size": 8, "average_tokens_across_devices": False}, "the loss would depend on the devices"),
        ({"global_batch_size": 8, "accelerator_config": {"split_batches": True}}, "'split_batches' would change"),
    ],
)
def test_contradicting_settings_of_a_batch_are_told(values, words):
    assert any(words in problem for problem in list_problems(4, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"global_batch_size": 32},
        {"global_batch_size": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"global_batch_tokens": 8 * 512, **PACKED},
        {"per_device_train_batch_size": 3},
    ],
)
def test_a_batch_that_devices_can_share_has_no_problem(values):
    assert not list_problems(4, **values)


def test_a_device_may_take_each_size_that_divides_its_share():
    settings = Settings(global_batch_size=48)
    rows = find_global_batch(settings.training, settings.data)
    assert rows == 48
    assert list_device_batches(rows, 4, settings.training) == [12, 6, 4, 3, 2, 1]
    settings = Settings(global_batch_size=48, gradient_accumulation_steps=3)
    assert list_device_batches(48, 4, settings.training) == [4]


def test_a_huge_batch_is_shared_at_once():
    sizes = list_device_batches(10**18, 1, Settings(global_batch_size=10**18).training)
    assert sizes[0] == 256
    assert sizes[-1] == 1


def test_tokens_are_those_of_whole_sequences():
    settings = Settings(global_batch_tokens=4096, **PACKED)
    assert find_global_batch(settings.training, settings.data) == 8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"per_device_train_batch_size": 4},
            "lower per_device_train_batch_size (now 4) and raise gradient_accumulation_steps (now 1) as much",
        ),
        (
            {"global_batch_size": 8},
            "set a per_device_train_batch_size below what the log's line on the global batch says",
        ),
        ({"global_batch_size": 8, "per_device_train_batch_size": 4}, "lower per_device_train_batch_size (now 4)"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "raise gradient_accumulation_steps (now 2)"),
        (
            {"global_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "lower per_device_train_batch_size (now 4) and raise gradient_accumulation_steps (now 2) as much",
        ),
    ],
)
def test_fewer_rows_at_once_leave_the_step_as_large(values, words):
    assert describe_smaller_pieces(Settings(**values).training) == words


def test_the_formula_of_a_step_is_told():
    assert describe_batch(8, 4, 2) == "global batch 64 rows = 8 a device x 4 devices x 2 accumulation steps"
