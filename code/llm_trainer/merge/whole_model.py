# SPDX-License-Identifier: Apache-2.0
"""Merged models with the tokenizer's files beside them, as a training begins with one."""

from pathlib import Path
from typing import Any

from llm_trainer.common import log
from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.common.units import show_bytes
from llm_trainer.config.sections import AdapterSettings, ModelSettings
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.loading import read_config
from llm_trainer.model.tokenizer_files import copy_tokenizer, make_readable


def write_whole_model(request: MergeRequest, output: Path) -> dict[str, Any]:
    """Write the merged weights, and the tokenizer's files; return what `write_merged_model` returns."""
    figures = write_merged_model(request, output)
    write_tokenizer(request.adapter, request.base, output)
    return figures


def write_tokenizer(adapter: Path, base: Path, output: Path) -> None:
    """Write the tokenizer's files: the adapter's, which may have a template or tokens of its own, else the base's."""
    copy_tokenizer(adapter if list(adapter.glob("tokenizer*")) else base, output)
    make_readable(output)


def merge_earlier_adapter(base: Path, model: ModelSettings, adapter: AdapterSettings, scratch_dir: Path) -> str:
    """Return the folder of the base with the earlier adapter merged into it, which is written once a host.

    Raises UserError where they do not fit together, and where the disk fills up.
    """
    output = scratch_dir / "merged-base"

    def merge() -> None:
        trusts = model.trust_remote_code
        request = MergeRequest(base, Path(str(adapter.adapter_path)), read_config(str(base), model), None, None, trusts)
        figures = write_whole_model(request, output)
        log.info(
            f"Merged the adapter {request.adapter} into the base: {figures['merged_tensors']} tensors, "
            f"{show_bytes(figures['bytes'])} in {figures['seconds']:.0f} s"
        )

    run_on_local_rank_zero(scratch_dir / "merged-base.done", merge)
    return str(output)
