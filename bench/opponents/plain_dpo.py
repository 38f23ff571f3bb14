# SPDX-License-Identifier: Apache-2.0
"""What a user would write with TRL to train on preferences: forty lines, and TRL's defaults.

plain_dpo.py MODEL DATA OUTPUT ARGUMENTS_JSON
"""

import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model_path, data_path, output_dir, arguments = sys.argv[1:]
values = json.loads(arguments)

tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
dataset = load_dataset("json", data_files=data_path, split="train")
peft_config = LoraConfig(
    r=values.pop("lora_r"),
    lora_alpha=values.pop("lora_alpha"),
    lora_dropout=values.pop("lora_dropout"),
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
arguments = DPOConfig(
    output_dir=output_dir,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    **values,
)
trainer = DPOTrainer(
    model=model,
    args=arguments,
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=peft_config,
)
trainer.train()
trainer.save_model(output_dir)
