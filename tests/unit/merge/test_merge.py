# SPDX-License-Identifier: Apache-2.0
"""The merge from disk to disk equals PEFT's own, of the model in memory, for each kind of model, file and adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from llm_trainer.common.errors import UserError
from llm_trainer.merge import merge as merge_module
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.merge.shard_writer import UNFINISHED
from support.tiny_gpt_oss import build_tiny_gpt_oss

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
EXPERTS = {**WIDTH, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []}
LINEAR = {"target_modules": "all-linear"}
FUSED = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
MODELS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(**WIDTH, tie_word_embeddings=False), LINEAR),
    "rslora with patterns": (
        LlamaConfig(**WIDTH),
        {**LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ),
    "dora": (LlamaConfig(**WIDTH), {**LINEAR, "use_dora": True}),
    "bias": (LlamaConfig(**WIDTH, attention_bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "saved modules": (LlamaConfig(**WIDTH), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2": (GPT2Config(**SIZES, tie_word_embeddings=True), {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "gpt2 dora": (GPT2Config(**SIZES), {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "gemma2": (Gemma2Config(**WIDTH, head_dim=8), LINEAR),
    "embeddings": (LlamaConfig(**WIDTH, tie_word_embeddings=False), {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora embeddings": (LlamaConfig(**WIDTH), {"target_modules": ["embed_tokens"], "use_dora": True}),
    "qwen3 moe": (Qwen3MoeConfig(**EXPERTS), FUSED),
    "mixtral": (MixtralConfig(**WIDTH, num_local_experts=4), FUSED),
    "router": (Qwen3MoeConfig(**EXPERTS), {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
}


def make_base(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, shard_size: str = "20KB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def make_adapter(folder: Path, base: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(0, 0.2)  # in place: some share their numbers
    adapted.save_pretrained(folder)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merge_whole(base: Path, adapter: Path, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def run_merge(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, Any]:
    return write_merged_model(MergeRequest(base, adapter, AutoConfig.from_pretrained(base), **options), output)


def compute_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    base = make_base(tmp_path / "base", MODELS["llama"][0], torch.float32)
    return base, make_adapter(tmp_path / "adapter", base, **LINEAR)


@pytest.mark.parametrize("name", MODELS)
def test_merge_equals_peft(name: str, tmp_path: Path) -> None:
    config, options = MODELS[name]
    base = make_base(tmp_path / "base", config, torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    figures = run_merge(base, adapter, tmp_path / "merged")
    whole = merge_whole(base, adapter)
    whole.save_pretrained(tmp_path / "whole")
    ours, theirs = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "whole")
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}  # PEFT leaves the config of tied weights to the user
    for tensor in theirs:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-5)
    assert figures["merged_tensors"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    torch.testing.assert_close(compute_logits(loaded), compute_logits(adapted), rtol=1e-3, atol=1e-3)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", MODELS["llama"][0], torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
    figures = run_merge(base, adapter, tmp_path / "merged")
    expected = merge_whole(base, adapter).state_dict()
    found = read_tensors(tmp_path / "merged")
    different = sum((found[name] != expected[name].bfloat16()).sum().item() for name in found)
    assert figures["dtype"] == "bfloat16"
    assert different <= 1e-4 * sum(map(torch.numel, found.values()))  # float32 sums in another order


def test_shards_names_and_config_are_the_bases(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    (base / "modeling_own.py").write_text("")
    figures = run_merge(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    index = "model.safetensors.index.json"
    maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (base, tmp_path / "merged")]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert maps[0] == maps[1] and figures["shards"] == len(set(maps[0].values())) > 3
    assert (config["dtype"], config["use_cache"], config["tie_word_embeddings"]) == ("bfloat16", True, False)
    assert names == {*maps[0].values(), index, "config.json", "generation_config.json"}
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "merged").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("targets", "shared", "tied"),
    [
        (["q_proj"], False, True),
        (["embed_tokens"], False, False),
        (["lm_head"], False, False),
        (["embed_tokens", "lm_head"], True, True),
    ],
)
def test_tied_embeddings(targets: list[str], shared: bool, tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**WIDTH, tie_word_embeddings=True), torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets, ensure_weight_tying=shared)
    run_merge(base, adapter, tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in read_tensors(tmp_path / "merged")) is not tied
    torch.testing.assert_close(compute_logits(loaded), compute_logits(adapted), rtol=1e-4, atol=1e-4)


def test_mxfp4_becomes_bfloat16(tmp_path: Path) -> None:
    base = build_tiny_gpt_oss(tmp_path / "base")
    scatter(base)
    torch.manual_seed(1)
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapted = get_peft_model(model, LoraConfig(r=4, **targets, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    adapted.save_pretrained(tmp_path / "adapter")
    figures = run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(base, **options).float()
    expected = PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert figures["merged_tensors"] == 4 and found.config.dtype == torch.bfloat16
    assert not hasattr(found.config, "quantization_config")
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=1e-2, atol=1e-3)


def scatter(base: Path) -> None:
    """Put all scales into another shard than their blocks."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "int8"])
def test_dequantized_base_is_what_was_trained_on(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**{**WIDTH, "hidden_size": 64}), torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=kind != "int8",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="fp4" if kind == "fp4" else "nf4",
        bnb_4bit_use_double_quant=kind == "nested",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    run_merge(base, adapter, tmp_path / "merged", dtype=torch.bfloat16, quantization=quantization)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    expected = model.dequantize(torch.bfloat16).state_dict()
    found = read_tensors(tmp_path / "merged")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]) is ("q_proj" not in name), name


def test_base_stored_in_4_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", MODELS["llama"][0], torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    model.save_pretrained(tmp_path / "stored")
    run_merge(tmp_path / "stored", adapter, tmp_path / "merged")
    expected = model.dequantize(torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]) is ("q_proj" not in name), name


def test_an_unfinished_merge_goes_on(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = llama
    whole = tmp_path / "whole"
    run_merge(base, adapter, whole)
    begun = tmp_path / "begun"
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "write_config", fail)
        with pytest.raises(UserError, match="goes on"):
            run_merge(base, adapter, begun)
    (begun / UNFINISHED / "model-00001-of-00002.part").write_bytes(b"half")
    newest = sorted(begun.glob("*.safetensors"))[0]
    newest.unlink()  # as if it had not been merged yet
    with pytest.raises(UserError, match="unfinished merge of another base or adapter"):
        run_merge(base, adapter, begun, dtype=torch.float16)
    run_merge(base, adapter, begun)
    assert "shards were merged before" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in begun.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def fail(*_: Any) -> None:
    raise OSError("no space left")


def cut_shard(base: Path, adapter: Path, output: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def fill_output(base: Path, adapter: Path, output: Path) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")


def widen_adapter(base: Path, adapter: Path, output: Path) -> None:
    change_adapter(adapter, lambda tensors: {**tensors, KEY: torch.zeros(4, 48)})


def rename_tensor(base: Path, adapter: Path, output: Path) -> None:
    change_adapter(adapter, lambda tensors: {**tensors, KEY.replace("layers.0", "layers.7"): torch.zeros(4, 32)})


def drop_tensor(base: Path, adapter: Path, output: Path) -> None:
    change_adapter(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != KEY})


def break_adapter(base: Path, adapter: Path, output: Path) -> None:
    change_adapter(adapter, lambda tensors: {**tensors, KEY: torch.full((4, 32), torch.nan)})


def aim_elsewhere(base: Path, adapter: Path, output: Path) -> None:
    change_config(adapter, target_modules=["absent"])


def begin_elsewhere(base: Path, adapter: Path, output: Path) -> None:
    change_config(adapter, init_lora_weights="pissa")


def be_ia3(base: Path, adapter: Path, output: Path) -> None:
    change_config(adapter, peft_type="IA3")


def change_adapter(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISTAKES = {
    cut_shard: r"model-00002-of-\d+\.safetensors is .* bytes of",
    fill_output: r"not empty \(notes.txt\)",
    widen_adapter: r"layers.0.self_attn.q_proj.lora_A.weight has shape \[4, 48\], and the base needs \[4, 32\]",
    rename_tensor: r"layers.7.self_attn.q_proj.lora_A.weight of shape \[4, 32\] fits nothing",
    drop_tensor: r"lacks base_model.*q_proj.lora_A.weight, of shape \[4, 32\]",
    break_adapter: r"q_proj.lora_A.weight holds numbers that are not finite",
    aim_elsewhere: r"does not fit the base: Target modules",
    begin_elsewhere: r"init_lora_weights=pissa",
    be_ia3: r"only LoRA",
}


@pytest.mark.parametrize("spoil", MISTAKES, ids=lambda spoil: spoil.__name__)
def test_mistake_is_told_before_work(spoil: Callable[..., None], llama: tuple[Path, Path], tmp_path: Path) -> None:
    spoil(*llama, tmp_path / "merged")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=MISTAKES[spoil]):
        run_merge(*llama, tmp_path / "merged")
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_disk_too_small(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "find_free_bytes", lambda folder: 1234)
    with pytest.raises(UserError, match=r"needs \d+,\d+ bytes in .*, and 1,234 are free"):
        run_merge(*llama, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_base_in_another_quantization_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**WIDTH), torch.float32)
    config = AutoConfig.from_pretrained(base)
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match="stored in gptq"):
        adapter = make_adapter(tmp_path / "adapter", base, **LINEAR)
        write_merged_model(MergeRequest(base, adapter, config), tmp_path / "merged")
