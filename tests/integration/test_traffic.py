# SPDX-License-Identifier: Apache-2.0
"""What sharded ranks really send, counted on a loopback of their own by bench/ranks.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from support.tiny_model import build_tiny_model

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from ranks import OWN_NETWORK, Job, compute_bytes, measure

pytestmark = pytest.mark.long


def test_gradients_go_to_their_shards_after_each_batch(tmp_path):
    if subprocess.run([*OWN_NETWORK, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no network namespaces")
    model, job = build_tiny_model(tmp_path / "model"), Job(2, "fsdp", use_peft=False, pieces=2)
    computed = compute_bytes(job, AutoConfig.from_pretrained(model))
    # Were they kept whole until the last batch, a quarter would be missing; the rest are headers and metrics.
    assert computed <= measure(job, model).step_bytes < 1.1 * computed
