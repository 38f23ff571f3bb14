# SPDX-License-Identifier: Apache-2.0
"""The demo of preferences: trains the first demo's adapter on with method=dpo, and ranks pairs before and after."""

import argparse
import sys
from pathlib import Path

from evaluate import read_rows
from rank import ranked_right
from run import lay_out, train_between

PAIRS = Path(__file__).parent / "pairs"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# The first demo left the model all but certain of the old line. A small beta lets it move far from that, and a learning
# rate this high lets it do so in one short epoch.
HYPERPARAMETERS = {
    "method": "dpo",
    "beta": "0.03",
    "learning_rate": "0.001",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": "0.1",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "4",
    "max_length": "256",
    "logging_steps": "5",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sft_dir", type=Path, help="the tree of the first demo")
    parser.add_argument("base_dir", type=Path, help="where /opt/ml is laid out")
    arguments = parser.parse_args()
    sft_dir, base_dir = arguments.sft_dir.absolute(), arguments.base_dir.absolute()
    model, adapter = sft_dir / "input/data/model", sft_dir / "model"
    channels = {name: [PAIRS / f"{name}.jsonl"] for name in ("train", "validation")}
    channels["adapter"] = [adapter / name for name in (*ADAPTER_FILES, "training_manifest.json")]
    lay_out(base_dir, HYPERPARAMETERS, channels, model)
    rows = read_rows(PAIRS / "heldout.jsonl")
    asks = f"ranking {len(rows)} held-out pairs"
    return train_between(
        base_dir, "demo-dpo", "pairs ranked right", lambda new: ranked_right(model, rows, new or adapter), asks
    )


if __name__ == "__main__":
    sys.exit(main())
