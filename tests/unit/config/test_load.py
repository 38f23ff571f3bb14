# SPDX-License-Identifier: Apache-2.0
"""What the user asked for is what the job gets, and every mistake is told at once, in the user's words."""

import itertools

import pytest

from llm_trainer.common.redaction import REDACTED, hide_in, hide_secrets
from llm_trainer.config.load import read_settings
from llm_trainer.config.schema import FIELDS, Settings, describe_settings
from llm_trainer.config.sections import ALIASES
from support.environments import build_environment


def settings_of(hyperparameters: dict[str, str], **arguments: str) -> Settings:
    settings, problems = read_settings(build_environment(hyperparameters=hyperparameters), arguments)
    assert not problems
    return settings


def problems_of(hyperparameters: dict[str, str]) -> list[str]:
    return read_settings(build_environment(hyperparameters=hyperparameters), {})[1]


def test_the_seeds_argument_file_is_accepted_as_it_is(tmp_path):
    args = tmp_path / "args.yaml"
    args.write_text(
        """
        model_id: "Qwen/Qwen3-0.6B"
        mlflow_uri: ""
        mlflow_experiment_name: "qwen3-06b-ddp"
        output_dir: "/opt/ml/model"
        checkpoint_dir: "/opt/ml/checkpoints/"
        train_dataset_path: "/opt/ml/input/data/train/"
        val_dataset_path: "/opt/ml/input/data/val/"
        token: ""
        merge_weights: true
        apply_truncation: true
        attn_implementation: "flash_attention_2"
        learning_rate: 5e-5
        num_train_epochs: 1
        per_device_train_batch_size: 4
        per_device_eval_batch_size: 2
        gradient_accumulation_steps: 4
        gradient_checkpointing: true
        torch_dtype: "bfloat16"
        bf16: true
        tf32: true
        ignore_data_skip: true
        logging_strategy: "steps"
        logging_steps: 1
        log_on_each_node: false
        ddp_find_unused_parameters: false
        save_total_limit: 1
        save_steps: 100
        warmup_steps: 100
        weight_decay: 0.01
        load_in_4bit: true
        lora_r: 32
        lora_alpha: 64
        lora_dropout: 0.03
        use_snapshot_download: true
        early_stopping: false
        use_mxfp4: false
        use_peft: true
        target_modules: ["q_proj", "v_proj"]
        wandb_token: ""
        wandb_project: "project"
        """
    )
    settings, problems = read_settings(build_environment(hyperparameters={"config": str(args)}, num_gpus=8), {})
    assert not problems
    assert settings.training.learning_rate == 5e-5  # YAML 1.1 reads `5e-5` as a text
    assert settings.adapter.lora_r == 32
    assert settings.model.token is None
    assert settings.tracking.mlflow_uri is None
    assert settings.adapter.target_modules == ["q_proj", "v_proj"]


def test_the_command_line_wins_over_hyperparameters_and_those_over_the_file(tmp_path):
    (tmp_path / "args.yaml").write_text("lora_r: 1\nlora_alpha: 1\nseed: 1\n")
    environment = build_environment(hyperparameters={"lora_r": "2", "lora_alpha": "2"}, channels={"config": tmp_path})
    settings, problems = read_settings(environment, {"lora_r": "3"})
    assert not problems
    assert (
        settings.adapter.lora_r,
        settings.adapter.lora_alpha,
        settings.training.seed,
        settings.adapter.lora_dropout,
    ) == (3, 2, 1, 0.0)


def test_every_mistake_is_told_in_one_go():
    problems = problems_of(
        {
            "lora_rnak": "8",
            "lr": "1e-4",
            "lora_r": "0",
            "torch_dtype": "bf16",
            "learning_rate": "fast",
            "packing": "maybe",
            "optim": "adamw",
            "lora_dropout": "1.5",
        }
    )
    assert problems == [
        "Hyperparameter 'lora_rnak' is not a setting: the nearest valid name is 'lora_r'.",
        "Hyperparameter 'lr' is not a setting: the nearest valid name is 'learning_rate'.",
        "lora_r='0' is not valid: it must be a whole number, at least 1; its default is 8.",
        "torch_dtype='bf16' is not valid: it must be one of auto, bfloat16, float16, float32; "
        "the nearest is 'bfloat16'.",
        "learning_rate='fast' is not valid: it must be a number, above 0; its default is 2e-4 for an adapter, 2e-5 "
        "for all weights; other methods take less.",
        "packing='maybe' is not valid: it must be true or false or null; leave it out for none.",
        problems[6],
        "lora_dropout='1.5' is not valid: it must be a number, at least 0 and below 1; its default is 0.0.",
    ]
    assert problems[6].startswith("optim='adamw' is not valid: it must be one of adamw_torch,")
    assert problems[6].endswith("the nearest is 'adamw_torch'.")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_r", "true"),
        ("lora_r", "8.5"),
        ("lora_r", "[8]"),
        ("learning_rate", "NaN"),
        ("learning_rate", "1e999"),
        ("max_length", "1"),
        ("per_device_train_batch_size", "0"),
        ("num_train_epochs", "-1"),
        ("use_peft", "2"),
        ("lr_scheduler_type", "cosine_annealing"),
        ("report_to", "mlfow"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_refused(name, value):
    (problem,) = problems_of({name: value})
    assert problem.startswith(f"{name}={value!r} is not valid")


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("model_name_or_path", "model_id", "x"),
        ("dtype", "torch_dtype", "float32"),
        ("max_seq_length", "max_length", 512),
        ("warmup_ratio", "warmup_steps", 0.03),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", {"use_reentrant": False}),
    ],
)
def test_the_fields_other_spellings_are_accepted(alias, name, value):
    assert settings_of({alias: str(value)}).value(name) == value


def test_two_spellings_of_one_setting_clash():
    (problem,) = problems_of({"dtype": "float32", "torch_dtype": "bfloat16"})
    assert "given twice" in problem


def test_aliases_point_at_settings():
    assert set(ALIASES.values()) <= set(FIELDS)
    assert not set(ALIASES) & set(FIELDS)


def test_what_sagemaker_adds_is_not_rejected():
    settings_of({"sagemaker_program": '"train.py"', "sagemaker_region": "eu-west-1", "_tuning_objective_metric": "x"})


def test_null_asks_for_the_default():
    settings = settings_of({"lora_r": "None", "learning_rate": "null", "max_length": "null"})
    assert (settings.adapter.lora_r, settings.training.learning_rate, settings.data.max_length) == (8, 2e-5, None)


@pytest.mark.parametrize("text", ["no", "false", '"no"'])
def test_a_bare_no_is_the_choice_that_it_says(tmp_path, text):
    file = tmp_path / "args.yaml"
    file.write_text(f"eval_strategy: {text}\nsave_strategy: {text}\n")
    settings = settings_of({"config": str(file), "logging_strategy": "False"})
    strategies = settings.training.eval_strategy, settings.training.save_strategy, settings.training.logging_strategy
    assert strategies == ("no", "no", "no")


def test_other_settings_do_not_take_a_bare_no():
    (problem,) = problems_of({"optim": "false"})
    assert problem.startswith("optim='false' is not valid")


def test_a_wrong_value_is_told_the_default_that_the_job_has():
    assert problems_of({"learning_rate": "0"})[0].endswith(
        "its default is 2e-4 for an adapter, 2e-5 for all weights; other methods take less."
    )
    assert problems_of({"lora_r": "0"})[0].endswith("its default is 8.")


def test_contradictions_are_told_with_the_mistakes():
    problems = problems_of({"packing": "true", "max_length": "null", "lora_rnak": "8"})
    assert [problem.split()[0] for problem in problems] == ["Hyperparameter", "packing=true"]


def test_secrets_appear_neither_in_settings_nor_in_messages():
    settings = settings_of({"token": "hf_secret", "wandb_token": "w_secret", "hub_token": "h_secret"})
    assert "secret" not in repr(settings) + repr(describe_settings(settings))
    assert describe_settings(settings)["token"] == REDACTED
    assert settings.model.token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in hide_secrets(problems_of({"token": '["hf_secret"]', "lora_r": "x"})[0])


@pytest.mark.parametrize("text", ["a: [", "- a list", "just text"])
def test_a_bad_yaml_file_is_told_with_its_name(tmp_path, text):
    file = tmp_path / "args.yaml"
    file.write_text(text)
    (problem,) = problems_of({"config": str(file)})
    assert str(file) in problem
    assert "key: value" in problem


def test_a_bad_yaml_file_is_not_quoted_because_a_line_can_hold_a_token(tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text("token: hunter2: x\n")
    (problem,) = problems_of({"config": str(file)})
    assert "line 1" in problem
    assert "hunter2" not in problem


def test_a_missing_yaml_file_is_told():
    (problem,) = problems_of({"config": "/nowhere/args.yaml"})
    assert "config='/nowhere/args.yaml' does not exist" in problem


def test_a_config_channel_needs_one_yaml_file(tmp_path):
    _, problems = read_settings(build_environment(channels={"config": tmp_path}), {})
    assert "must hold exactly one .yaml file but has none" in problems[0]
    (tmp_path / "prices.json").touch()  # which the channel may be there for
    assert not any(
        "yaml" in problem for problem in read_settings(build_environment(channels={"config": tmp_path}), {})[1]
    )


def test_a_password_in_a_url_is_not_shown():
    settings = settings_of({"mlflow_uri": "https://me:secret@mlflow.example/x", "model_id": "org/name@x"})
    shown = hide_in(describe_settings(settings))
    assert shown["mlflow_uri"] == f"https://{REDACTED}@mlflow.example/x"
    assert shown["model_id"] == "org/name@x"


def test_an_object_comes_whole():
    settings = settings_of({"distribution": "fsdp", "fsdp_config": '{"reshard_after_forward": false}'})
    assert settings.parallelism.fsdp_config == {"reshard_after_forward": False}


def test_a_hostile_yaml_file_ends_in_a_sentence_that_names_it(tmp_path):
    names = "abcdefghi"
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise(names)]
    laughs = "\n".join(["a: &a [x]", *lines])
    loop, deep, tag = "a: &a [*a]", "[" * 100_000, "a: !!python/object:os.system x"
    for number, text in enumerate([laughs, loop, deep, tag, "a: \0", "{"]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        (problem,) = problems_of({"config": str(file)})
        assert problem.startswith(f"{file} ")
        assert problem.endswith(": write it as `key: value` lines.")
    assert problems_of({"config": "None"}) == []
