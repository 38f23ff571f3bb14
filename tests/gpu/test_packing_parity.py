# SPDX-License-Identifier: Apache-2.0
"""Rows that share a sequence have the logits that they have alone, on this device, in each type and with each kernel.

Prints how far they move, by which the tolerances of llm_trainer/training/packing_check.py can be judged.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import gpu
from support.attention_kernels import KERNELS, find_lack

for package in ("trl", "datasets", "pydantic"):  # what llm_trainer.training.packing imports
    pytest.importorskip(package)
from llm_trainer.training import packing_check  # noqa: E402
from llm_trainer.training.packing import PackingCollator  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_rows_are_kept_apart(kernel, dtype, size, device):
    if lack := find_lack(kernel, device):
        pytest.skip(lack)
    if kernel.startswith("flash") and dtype == torch.float32:
        pytest.skip(f"{kernel} takes no float32")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(gpu.SIZES[size], dtype=dtype, attn_implementation=kernel).eval()
    collate = PackingCollator(pad_token_id=0, max_length=None, flattens=kernel.startswith("flash"))
    by_others, by_company = measure(model, collate)
    print(
        f"{size} {kernel} {dtype}: logits move by {by_others:.2g} of their spread after other rows "
        f"(tolerance {packing_check.MOVED_BY_OTHERS[dtype]:g}) and by {by_company:.2g} in company "
        f"({packing_check.MOVED_BY_COMPANY[dtype]:g})"
    )
    assert by_others <= packing_check.MOVED_BY_OTHERS[dtype]
    assert by_company <= packing_check.MOVED_BY_COMPANY[dtype]
    assert packing_check.find_cross_row_attention(model, collate) is None


@torch.no_grad()
def measure(model, collate) -> tuple[float, float]:
    """How far the watched rows' logits move, as a share of their spread: after other rows, the most, and in company of
    others, the middle one."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = model.config.vocab_size
    rows, others = (
        [torch.randint(vocabulary, (length,), generator=generator) for length in packing_check.ROW_LENGTHS]
        for _ in range(2)
    )
    packed = packing_check.forward_packed(model, collate, rows)
    after_others = packing_check.forward_packed(
        model, collate, [*others[: packing_check.WATCHED.start], *rows[packing_check.WATCHED]]
    )
    alone = torch.cat(
        [packing_check.forward(model, input_ids=row[None].to(model.device))[0] for row in rows[packing_check.WATCHED]]
    )
    return packing_check.measure_distances(after_others, packed).max().item(), packing_check.measure_distances(
        packed, alone
    ).median().item()


def test_a_kernel_that_forgets_where_rows_begin_is_found_out(size, device):
    """Without position ids, what the rows are told apart by."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(gpu.SIZES[size], attn_implementation="sdpa").eval()
    collate = PackingCollator(pad_token_id=0, max_length=None, flattens=False)

    def forgetful(examples):
        return {name: value for name, value in collate(examples).items() if name != "position_ids"}

    by_others, by_company = measure(model, forgetful)
    print(
        f"{size}: without position ids logits move by {by_others:.2g} after other rows, by {by_company:.2g} in company"
    )
    assert by_others > packing_check.MOVED_BY_OTHERS[torch.bfloat16]
    assert packing_check.find_cross_row_attention(model, forgetful) is not None
