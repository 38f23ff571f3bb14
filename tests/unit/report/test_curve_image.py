# SPDX-License-Identifier: Apache-2.0
from llm_trainer.report.charts import draw_curves
from llm_trainer.report.curve_image import choose_colours, write_image
from llm_trainer.report.history import History


def build_charts():
    history = History()
    for step in range(30):
        history.metrics["train_loss"].add(step, 3 - step / 30)
        history.metrics["eval_loss"].add(step, 3.0)
    return list(draw_curves(history))


def test_the_image_is_written_whole(tmp_path):
    write_image(build_charts(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_without_curves_there_is_no_image(tmp_path):
    write_image([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_a_curve_and_its_smoothed_form_share_a_colour():
    (chart,) = build_charts()
    logged, smoothed, evaluation = choose_colours(chart)
    assert logged == smoothed != evaluation
