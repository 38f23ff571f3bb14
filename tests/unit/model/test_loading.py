# SPDX-License-Identifier: Apache-2.0
"""A model that cannot be trained is refused in a sentence, by its config alone."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, dynamic_module_utils

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.model import loading
from llm_trainer.model.attention import read_needs
from llm_trainer.model.loading import (
    LoadOptions,
    build_skeleton,
    check_fit,
    choose_bar,
    choose_pad_token,
    find_stop_ids,
    load_model,
    load_tokenizer,
    log_tensors,
    read_config,
    restore_generation_config,
)
from llm_trainer.training.trainer_config import share_pad_token
from support.tiny_model import build_tokenizer

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    _supports_flash_attn = False
"""


@pytest.fixture
def change(tiny_model, tmp_path, monkeypatch):
    """Makes a copy of the tiny model with another config."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def write(**values):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return str(folder)

    return write


def refusal_of(model, **settings):
    with pytest.raises(UserError) as refusal:
        read_config(model, Settings(**settings).model)
    (sentence,) = refusal.value.problems
    assert sentence.startswith(f"model_id='{model}' ")
    return sentence.removeprefix(f"model_id='{model}' ")


def test_an_unknown_type_is_refused(change):
    assert refusal_of(change(model_type="llama9")) == (
        f"is of type llama9, which Transformers {transformers.__version__} does not know: "
        "give a model of a type that it knows."
    )


def test_a_text_config_that_is_no_object_is_refused(change):
    with pytest.raises(UserError, match="has a text_config that is no JSON object: download the model again"):
        read_config(change(text_config=5), Settings().model)


@pytest.mark.parametrize("kind", ["vit", "clip", "t5"])
def test_what_is_no_causal_language_model_is_refused(change, kind):
    assert refusal_of(change(model_type=kind)) == (
        f"is of type {kind}, which is no causal language model and no image-text model: give one that is."
    )


OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def test_a_model_with_code_of_its_own_is_refused_or_trusted(change):
    model = change(model_type="own", auto_map=OWN)
    with open(f"{model}/own.py", "w", encoding="utf-8") as file:
        file.write(OWN_CODE)
    assert refusal_of(model) == (
        "needs code of its own and trust_remote_code is false: set it to true if you trust that code."
    )
    settings = Settings(trust_remote_code=True).model
    config = read_config(model, settings)
    needs = read_needs(build_skeleton(model, config, trust_remote_code=True))
    assert needs.model == "OwnForCausalLM"
    assert needs.supported == {"eager", "sdpa", "flex_attention"}
    loaded = load_model(model, settings, LoadOptions(torch.float32, "sdpa"), torch.device("cpu"))
    assert loaded.config.model_type == "own"


def test_a_tokenizer_with_code_of_its_own_is_refused(change):
    model = change()
    with open(f"{model}/tokenizer_config.json", "w", encoding="utf-8") as file:
        json.dump({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}, file)
    with pytest.raises(UserError, match="needs code of its own and trust_remote_code is false"):
        load_tokenizer(model, Settings().model, 259)


def test_a_model_that_is_not_there_is_refused_offline(impatient_hub):
    with pytest.raises(UserError, match=r"^The config of nobody/nothing could not be loaded"):
        read_config("nobody/nothing", Settings().model)


def test_the_models_options_change_its_config_too(tiny_model):
    assert read_config(str(tiny_model), Settings(model_init_kwargs={"rms_norm_eps": 0.5}).model).rms_norm_eps == 0.5


@pytest.fixture
def change_weights(tiny_model, tmp_path):
    """Makes a copy of the tiny model with other tensors."""

    def change_them(removed=(), **added):
        folder = shutil.copytree(tiny_model, tmp_path / "changed")
        weights = {**load_file(folder / "model.safetensors"), **added}
        weights = {name: tensor for name, tensor in weights.items() if name not in removed}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return change_them


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"removed": (UP,)}, f"lack 1 tensors of the model, first {UP}: give the whole model"),
        ({NORM: torch.ones(7)}, f"do not fit its config, first {NORM} has shape [7] and the model needs [32]: give"),
    ],
)
def test_weights_that_would_be_random_numbers_are_refused_before_they_load(change_weights, changes, problem):
    folder, settings = change_weights(**changes), Settings().model
    with pytest.raises(UserError, match=re.escape(problem)):
        check_fit(folder, read_config(folder, settings), settings)
    with pytest.raises(UserError, match=re.escape(problem)):
        load_model(folder, settings, LoadOptions(torch.float32, "eager"), torch.device("cpu"))


def test_weights_that_are_left_out_are_named(change_weights, tiny_model):
    settings = Settings().model
    config = read_config(str(tiny_model), settings)
    assert check_fit(str(tiny_model), config, settings) == []
    folder = change_weights(**{"mtp.layers.0.weight": torch.ones(3)})
    assert check_fit(folder, config, settings) == ["mtp.layers.0.weight"]


def test_an_option_that_nothing_reads_is_refused_with_the_config(tiny_model):
    with pytest.raises(UserError, match=r"^model_init_kwargs has 'foo', which is neither in the model's config"):
        read_config(str(tiny_model), Settings(model_init_kwargs={"foo": True, "rms_norm_eps": 0.5}).model)


def test_an_encoder_is_refused():
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match=r"is a BertLMHeadModel, an encoder with a head of its own \(cls.predictions"):
        build_skeleton("bert", config, trust_remote_code=False)


@pytest.mark.parametrize("has_file", [True, False])
def test_a_generation_config_is_written_back_as_it_was(tiny_model, tmp_path, has_file):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    file = folder / "generation_config.json"
    values = {**json.loads(file.read_text()), "temperature": 0.6, "do_sample": False}
    file.write_text(json.dumps(values))
    if not has_file:
        file.unlink()
    model = load_model(str(folder), Settings().model, LoadOptions(torch.float32, "eager"), torch.device("cpu"))
    share_pad_token(model, load_tokenizer(str(folder), Settings().model, 259))
    model.save_pretrained(tmp_path / "checkpoint")  # of a full fine-tune, which Transformers refused
    restore_generation_config(model, folder)
    model.save_pretrained(tmp_path / "export")
    written = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert written.get("temperature") == (0.6 if has_file else None)


def test_the_pad_token_is_not_the_eos():
    tokenizer = build_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert choose_pad_token(tokenizer, len(tokenizer)) == "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    assert choose_pad_token(tokenizer, len(tokenizer)) == "<|finetune_right_pad_id|>"


def test_a_tokenizer_with_nothing_but_eos_pads_with_it():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token = tokenizer.eos_token
    assert choose_pad_token(tokenizer, len(tokenizer)) == tokenizer.eos_token


def save_with_pad(tiny_model, folder, token):
    """A copy of the tiny model whose tokenizer pads with this token, which its 259 embeddings may have no row for."""
    shutil.copytree(tiny_model, folder)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_pad_token_beyond_the_embedding_gives_way_to_another_one(tiny_model, tmp_path):
    folder = save_with_pad(tiny_model, tmp_path / "model", "[PAD]")
    tokenizer = load_tokenizer(folder, Settings().model, 259)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert load_tokenizer(folder, Settings().model, 260).pad_token == "[PAD]"
    for setting in ("pad_token", "eos_token"):
        with pytest.raises(UserError, match=rf"{setting}='\[PAD\]' is the token 259 and .* has 259 rows: name a token"):
            load_tokenizer(folder, Settings(**{setting: "[PAD]"}).model, 259)
    with pytest.raises(
        UserError, match=r"ends sequences in '<\|im_end\|>', the token 2, and .* has 2 rows: name another"
    ):
        load_tokenizer(folder, Settings().model, 2)


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "<|im_end|>"])
def test_any_pad_will_do_where_it_is_no_eos(tiny_model, tmp_path, pad):
    folder = str(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = build_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder, Settings().model, 259).pad_token == "<|endoftext|>"


def test_a_config_whose_pad_token_keeps_the_model_from_being_built_is_refused(change):
    model = change(pad_token_id=259)
    config = read_config(model, Settings().model)
    for refused in (lambda: check_fit(model, config, Settings().model), lambda: build_skeleton(model, config, False)):
        with pytest.raises(
            UserError, match=r"has a pad_token_id in its config\.json that its embedding has no row for"
        ):
            refused()


@pytest.mark.parametrize("stop", ["</s>", [2, None], 2.5])
def test_a_stop_token_that_is_no_number_is_refused(tiny_model, tmp_path, stop):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    with pytest.raises(UserError, match="which is no token's number: give the number"):
        find_stop_ids(str(folder), build_tokenizer(), None)


def load_tiny(folder):
    return load_model(str(folder), Settings().model, LoadOptions(torch.float32, "eager"), torch.device("cpu"))


def test_a_model_that_loads_for_long_tells_how_many_of_its_tensors_are_there(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(loading, "SECONDS_A_LINE", 0.0)
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: 0.0))
    num_tensors = len(list(load_tiny(tiny_model).parameters()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Loading weights: ")]
    assert lines == [f"Loading weights: {done} of {num_tensors} tensors in 0 s" for done in range(num_tensors)]
    assert transformers.utils.logging.set_tqdm_hook(None) is None


def test_a_model_that_loads_at_once_tells_nothing(tiny_model, capsys):
    load_tiny(tiny_model)
    assert "Loading weights" not in capsys.readouterr().out


def test_a_line_on_loading_comes_every_half_minute(monkeypatch, capsys):
    times = iter([0.0, *(10.0 * done for done in range(8))])
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: next(times)))
    assert list(log_tensors("abcdefgh")) == list("abcdefgh")
    assert capsys.readouterr().out.splitlines() == [
        "Loading weights: 3 of 8 tensors in 30 s",
        "Loading weights: 6 of 8 tensors in 60 s",
    ]


def test_other_bars_of_transformers_stay_as_they_are():
    bar = choose_bar(lambda *arguments, **options: (arguments, options), ([1],), {"desc": "Writing model shards"})
    assert bar == (([1],), {"desc": "Writing model shards"})


def test_a_reward_model_needs_a_pad_token_that_ends_no_answer(tiny_model, monkeypatch):
    monkeypatch.setattr(loading, "choose_pad_token", lambda tokenizer, size: tokenizer.eos_token)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: bare_tokenizer())
    assert load_tokenizer(str(tiny_model), Settings().model, 259).pad_token == "<|im_end|>"
    with pytest.raises(UserError, match=r"has no special token but .* and the last token that is no padding"):
        load_tokenizer(str(tiny_model), Settings().model, 259, is_reward=True)


def bare_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def test_no_token_of_an_image_pads():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    assert loading.choose_pad_token(tokenizer, len(tokenizer)) == tokenizer.unk_token
