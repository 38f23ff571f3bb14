# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights, tried before the training: what would be missing at its end is told in time.

They are written as at the end, to a folder that is thrown away, from what is known of the job by then.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llm_trainer.common.errors import quote_error
from llm_trainer.common.files import write_json
from llm_trainer.config.sections import ModelSettings
from llm_trainer.export.base_source import BaseSource
from llm_trainer.export.model_card import CARD, read_stated_licence, write_model_card
from llm_trainer.journal.manifest import MANIFEST, Manifest
from llm_trainer.model.kinds.auto_class import sees_images
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.tokenizer_files import save_tokenizer
from llm_trainer.serving.lmi_files import ServedModel, write_serving_files

# Stand-ins for what only a training tells.
UNKNOWN = Manifest(trainable_parameters=0, parameters=0, metrics={}, num_steps=0, total_steps=0, world_size=1)


@dataclass(frozen=True, eq=False)
class KnownParts:
    """The parts that the files beside the weights are made of, as far as they are known before the training."""

    base: Path  # the folder of its files; a base that each rank fetches for itself has none
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    manifest: Manifest  # its first fields

    def write_card(self, folder: Path) -> None:
        """Write a model card and a manifest to a folder."""
        manifest = Manifest(**{**self.manifest, **UNKNOWN})
        write_model_card(folder, folder, manifest, (self.base, BaseSource(None, None, sees_images(self.config))), [])
        write_json(folder / MANIFEST, manifest)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer to a folder by the base's files."""
        save_tokenizer(self.tokenizer, self.base, folder, self.settings)

    def write_serving(self, folder: Path) -> None:
        """Write the files for a server to a folder, as for whole weights: an adapter's are not there yet."""
        template, dtype = self.tokenizer.chat_template, torch.bfloat16
        trusts, is_reward = self.settings.trust_remote_code, is_reward_model(self.config)
        model = ServedModel(self.config, 1, dtype, template, None, None, None, None, trusts, is_reward)
        write_serving_files(folder, model, folder)


def find_side_file_problems(parts: KnownParts) -> Iterator[str]:
    """Yield a sentence for each file beside the weights that could not be written, or would lack something."""
    if not parts.base.is_dir():
        return
    writers: dict[str, Callable[[Path], None]] = {
        f"{CARD} and {MANIFEST}": parts.write_card,
        "A copy of the base's tokenizer": parts.write_tokenizer,
        "The files for AWS's LMI container": parts.write_serving,
    }
    for what, write in writers.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder))
        except Exception as error:  # whatever it is, the weights come without these files
            yield (
                f"{what} could not be written after the training ({type(error).__name__}: {quote_error(error)}): "
                "mend what it names, else the result comes without."
            )
    with suppress(OSError):  # told already, as no card could be written
        if reason := read_stated_licence(parts.base / CARD)[1]:
            yield (
                f"the metadata of {parts.base / CARD} {reason}: mend them, else the result's model card does not name "
                "the licence that they state."
            )
