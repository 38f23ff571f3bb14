# SPDX-License-Identifier: Apache-2.0
"""Tiny models of random weights, with adapters on them that are trained for some steps."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from llm_trainer.config.schema import Settings
from llm_trainer.model import lora
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.quantization import keep_trainable

LAYERS = 2
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA = LlamaConfig(**SIZES)
GPT2 = GPT2Config(
    vocab_size=300,
    n_embd=64,
    n_layer=LAYERS,
    n_head=4,
    bos_token_id=0,
    eos_token_id=0,
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
)
TOKENS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))


def load_base(folder, in_4bit=False):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization if in_4bit else None)
    return keep_trainable(model).eval()


def plan_adapter(config, **settings):
    settings = Settings(**{"lora_r": 4, **settings})
    return lora.build_lora_config(settings.model, settings.adapter, build_skeleton("", config, trust_remote_code=False))


def adapt_base(base, config, in_4bit=False, **settings):
    model = load_base(base, in_4bit)
    torch.manual_seed(0)
    return get_peft_model(model, plan_adapter(config, load_in_4bit=in_4bit, **settings)).eval()


def train_adapter(model, num_steps=4):
    """The loss of each step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def compute_logits(model):
    return model(input_ids=TOKENS).logits
