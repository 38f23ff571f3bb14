# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - what TRL would import has to be hidden first
"""The best that we can write with TRL and nothing of this project: the opponent that counts.

    tuned.py MODEL DATA OUTPUT ARGUMENTS_JSON

Beside the plain script: libraries that TRL imports wherever they are installed are hidden, rows of like lengths share a
batch, nothing is pinned or shown, the weights are loaded once, by mmap, and malloc keeps what a step frees.
"""

import ctypes
import json
import os
import sys

for name in ("wandb", "mlflow", "bitsandbytes", "liger_kernel", "deepspeed", "vllm"):
    sys.modules[name] = None  # Python's way to say that a module is not there
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
    ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from trl import SFTConfig, SFTTrainer

disable_progress_bars()
logging.disable_progress_bar()
torch.set_num_threads(len(os.sched_getaffinity(0)))
model_path, data_path, output_dir, arguments = sys.argv[1:]
values = json.loads(arguments)

tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa")
with open(data_path, encoding="utf-8") as lines:
    dataset = Dataset.from_list([json.loads(line) for line in lines])
peft_config = LoraConfig(
    r=values.pop("lora_r"),
    lora_alpha=values.pop("lora_alpha"),
    lora_dropout=values.pop("lora_dropout"),
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
arguments = SFTConfig(
    output_dir=output_dir,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    train_sampling_strategy="group_by_length",
    **values,
)
trainer = SFTTrainer(
    model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
)
trainer.train()
trainer.save_model(output_dir)
