# SPDX-License-Identifier: Apache-2.0
"""Imports of torch, Transformers and the rest, without what takes seconds of them and is not needed."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_trainer.config.sections import MethodSettings, ModelSettings
from llm_trainer.config.trl_config_fields import read_snapshot

ModelSections = tuple[ModelSettings, MethodSettings]  # the sections that tell how models are loaded


@contextmanager
def import_quickly(model: ModelSettings) -> Iterator[None]:
    """Import, within the block, without searching for garbage and without scipy."""
    # Transformers would import scipy, for what finds things in pictures; a model's own code may ask for any package.
    needless = [] if model.trust_remote_code else ["scipy"]
    gc.disable()  # what imports make stays: to search it for garbage would take a sixth of their time
    try:
        with hide_packages(*needless):
            yield
    finally:
        gc.freeze()  # nor is it searched later
        gc.enable()


@contextmanager
def leave_out_bitsandbytes(sections: ModelSections, optim: str, *folders: str) -> Iterator[None]:
    """Run the block without bitsandbytes, which PEFT would import for an adapter, where this job has no use for it.

    `folders` are where its models lie, or their names on the Hub; "" for one that it has not.
    """
    with hide_packages(*([] if may_need_bitsandbytes(sections, optim, *folders) else ["bitsandbytes"])):
        yield


def may_need_bitsandbytes(sections: ModelSections, optim: str, *folders: str) -> bool:
    """Tell whether a job quantizes, has an optimizer that torch lacks, or a model that may be quantized already."""
    model, methods = sections
    quantizes = (
        *(model.load_in_4bit, model.load_in_8bit),
        *(methods.teacher_load_in_4bit, methods.teacher_load_in_8bit),
    )
    return any(quantizes) or optim in read_snapshot()["optim"].packages or any(map(may_be_quantized, folders))


def may_be_quantized(folder: str) -> bool:
    """Tell whether a model may be stored in a quantization of bitsandbytes. One on the Hub may; "" is none."""
    config = Path(folder) / "config.json"
    stored = config.read_text(encoding="utf-8") if config.is_file() else None
    return bool(folder) and (stored is None or ("quantization_config" in stored and '"mxfp4"' not in stored))


@contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Have this process find none of these packages within the block. One that was imported before stays."""
    hidden = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type] # as Python's documentation of sys.modules describes
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
