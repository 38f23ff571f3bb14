# SPDX-License-Identifier: Apache-2.0
"""An estimate of the bytes that a job writes to each disk, compared with the free space there."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.common.safetensors_files import list_shapes, list_weights
from llm_trainer.common.units import MIB, show_bytes
from llm_trainer.config.sections import AdapterSettings, OutputSettings, TrainingSettings
from llm_trainer.host.findings import Finding
from llm_trainer.host.free_space import FIX, find_free_bytes, find_nearest_folder
from llm_trainer.job.inputs import Inputs
from llm_trainer.readers.sources import FileSource


@dataclass(frozen=True)
class WriteSettings:
    """The sections of the settings that decide how much a job writes."""

    adapter: AdapterSettings
    training: TrainingSettings
    output: OutputSettings


@dataclass(frozen=True)
class BaseWeights:
    """The base's weights: the bytes of their files, and the shape of each tensor."""

    num_bytes: int
    shapes: Sequence[Sequence[int]]
    download: tuple[Path, int] | None = None  # the cache of the Hub's files, and the bytes that it still lacks


def inspect_disk_need(
    settings: WriteSettings, inputs: Inputs, cache_dir: Path, base: BaseWeights | None = None
) -> Iterator[Finding]:
    """Yield one finding for each disk that the job writes to: whether it has room. Less than a MiB always has.

    `base` is for a model on the Hub. Without it the weights are those in the job's folder, if it has one.
    """
    disks: dict[int, list[tuple[str, Path, float]]] = defaultdict(list)
    for what, folder, need_bytes in estimate_writes(settings, inputs, cache_dir, base or read_base(inputs.model)):
        if need_bytes >= MIB:
            disks[find_nearest_folder(folder).stat().st_dev].append((what, folder, need_bytes))
    for writes in disks.values():
        need_bytes = sum(size for _, _, size in writes)
        free_bytes = find_free_bytes(writes[0][1])
        listed = ", ".join(f"{what} {show_bytes(size)} in {folder}" for what, folder, size in writes)
        text = f"the job writes about {show_bytes(need_bytes)}, and {show_bytes(free_bytes)} are free ({listed})"
        if need_bytes <= free_bytes:
            yield Finding("disk need", "ok", text)
        else:
            yield Finding("disk need", "warning", f"{text}: {FIX}")


def read_base(model: str) -> BaseWeights:
    """Return what a folder holds of weights; none where the model is on the Hub, whose files come later."""
    folder = Path(model)
    if not model or not folder.is_dir():
        return BaseWeights(0, [])
    return BaseWeights(sum(map(measure_file, list_weights(folder))), list_shapes(folder))


def estimate_writes(
    settings: WriteSettings, inputs: Inputs, cache_dir: Path, base: BaseWeights
) -> Iterator[tuple[str, Path, float]]:
    """Yield what is written, the folder, and about how many bytes, as far as sizes are known before the job begins.

    An adapter has rank x (rows + columns) float32 numbers for a matrix. A checkpoint holds the trained weights in
    float32 and AdamW's two moments of each; while one is written, the older ones are still there. A token and its
    label take 8 bytes, and stand for about four bytes of the data.
    """
    num_weights = sum(map(math.prod, base.shapes))
    adapter_bytes = 4 * settings.adapter.lora_r * sum(sum(shape) for shape in base.shapes if len(shape) == 2)
    trained_bytes = adapter_bytes if settings.adapter.use_peft else 4 * num_weights
    num_checkpoints = max(2, settings.training.save_total_limit or 2) + 1 if settings.training.use_checkpoints else 0
    writes_model = settings.output.merge_weights or not settings.adapter.use_peft
    sources = [source for source in (*inputs.train, *inputs.validation) if isinstance(source, FileSource)]
    data_bytes = sum(measure_file(file) for source in sources for file in source.files)
    whole_bytes = max(base.num_bytes, 2 * num_weights)  # written in 16 bits, where it was in 4
    if base.download is not None:
        yield "download", *base.download
    if settings.adapter.merge_adapter:
        yield "merged base", Path(tempfile.gettempdir()), whole_bytes
    yield "result", inputs.model_dir, whole_bytes if writes_model else adapter_bytes
    yield "checkpoints", inputs.checkpoint_dir, num_checkpoints * 3 * trained_bytes
    yield "tokenized data", cache_dir, 2 * data_bytes


def measure_file(file: Path) -> int:
    """Return a file's bytes; 0 where it cannot be reached, which whoever reads it tells of."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
