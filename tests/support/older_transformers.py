# SPDX-License-Identifier: Apache-2.0
"""Run by Transformers 4: makes models as it stores them, and reads what the product wrote.

    older_transformers.py make FOLDER                    a folder below FOLDER for each model of MODELS
    older_transformers.py read BASE_OR_WHOLE[:ADAPTER]...    prints a JSON object for each, a line each

torch and what else the two versions share comes from the environment in SHARED_PACKAGES.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if "SHARED_PACKAGES" in os.environ:
    sys.path.append(os.environ["SHARED_PACKAGES"])

import torch
import transformers

TOKENS = list(range(3, 40))
MESSAGES = [{"role": "user", "content": "Hello <|im_end|> there"}, {"role": "assistant", "content": "Hi!"}]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
TEXT = "<|im_start|>A question, <|extra|> an answer<|im_end|> and 12 more."
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# name -> class of the config, and what differs from SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_theta": 500000.0}),
    "llama3": ("LlamaConfig", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"rope_theta": 1000000.0, "head_dim": 8, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3MoeConfig", {"rope_theta": 1000000.0, "head_dim": 8, **EXPERTS}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 20000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {"rope_theta": 20000.0, "partial_rotary_factor": 0.5, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_emb_base": 50000, "rotary_pct": 0.5, "tie_word_embeddings": False}),
    "olmo3": ("Olmo3Config", {"rope_theta": 500000.0, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("MistralConfig", {"rope_theta": 1000000.0, "sliding_window": 8}),
}


def make_models(folder: Path) -> None:
    """Write each model with a tokenizer whose special tokens are listed as Transformers 4 lists them."""
    for name, (class_name, options) in MODELS.items():
        config = getattr(transformers, class_name)(vocab_size=260, **{**SIZES, **options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.generation_config.eos_token_id = [2, 1]
        model.save_pretrained(folder / name)
        make_tokenizer(class_name).save_pretrained(folder / name)


def make_tokenizer(config_class: str) -> Any:
    """Return a tokenizer of bytes, of the family's class where its files need no more than that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*named, *alphabet, "<|extra|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    is_qwen = config_class.startswith("Qwen")
    kind = transformers.Qwen2TokenizerFast if is_qwen else transformers.PreTrainedTokenizerFast
    tokenizer = kind(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|extra|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read_model(place: str) -> dict[str, Any]:
    """Return what a reader of Transformers makes of a result."""
    folder, _, adapter = place.partition(":")
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter or folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits
    named = ("bos_token", "eos_token", "pad_token", "unk_token")
    extra = getattr(tokenizer, "additional_special_tokens", None) or getattr(tokenizer, "extra_special_tokens", [])
    return {
        "logits": logits[0].tolist(),
        "ids": tokenizer(TEXT)["input_ids"],
        "text": tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True),
        "tokens": {name: str(getattr(tokenizer, name)) for name in named},
        "special": sorted({*map(str, extra)} | {str(token) for token in tokenizer.all_special_tokens}),
        "chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False),
        "dtype": str(model.config.dtype),
        "eos": model.generation_config.eos_token_id,
    }


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_models(Path(sys.argv[2]))
    else:
        for place in sys.argv[2:]:
            print(json.dumps(read_model(place)))
