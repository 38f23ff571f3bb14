# SPDX-License-Identifier: Apache-2.0
"""Every image-text model of the pinned Transformers trains on texts, or is refused, as the page on them says.

`PYTHONPATH=code:tests python -m support.image_sweep` writes the page's table anew, of all types or of those named.
"""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llm_trainer.model.kinds.tower import list_tower
from support.image_sweep import read_table, try_type, write_base
from support.tiny_image_models import list_image_types

SHORT = ("gemma3", "qwen2_5_vl", "smolvlm")


def test_the_page_has_each_type():
    assert list(read_table()) == list_image_types()


@pytest.mark.parametrize("model_type", SHORT)
def test_a_type_trains_on_texts(model_type, tmp_path):
    assert str(try_type(model_type, tmp_path)) == read_table()[model_type] == "trained; rows share sequences"


@pytest.mark.long
@pytest.mark.parametrize("model_type", [name for name in list_image_types() if name not in SHORT])
def test_the_page_says_what_becomes_of_a_type(model_type, tmp_path):
    assert str(try_type(model_type, tmp_path)) == read_table()[model_type]


@pytest.mark.parametrize("use_peft", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_a_job_on_texts_leaves_a_model_that_sees(tree, use_peft):
    folder = tree.base_dir / "input/data/model"
    shutil.rmtree(folder)
    base = write_base("gemma3", folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    tree.change(use_peft=use_peft, merge_weights=use_peft, max_steps="2")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert "Vision: model.vision_tower, model.multi_modal_projector (" in result.stdout
    assert tree.manifest["export"]["proven"]
    model_dir = tree.base_dir / "model"
    trained = AutoModelForImageTextToText.from_pretrained(model_dir)
    assert type(trained) is type(base)
    tower = list_tower(base)
    assert all(torch.equal(trained.get_parameter(name), base.get_parameter(name)) for name in tower)
    assert tree.manifest["trainable_parameters"] <= base.num_parameters() - sum(
        base.get_parameter(name).numel() for name in tower
    )
    for place in (model_dir, model_dir / "adapter") if use_peft == "true" else (model_dir,):
        assert (place / "preprocessor_config.json").is_file()
        assert "AutoModelForImageTextToText, AutoProcessor" in (place / "README.md").read_text()
