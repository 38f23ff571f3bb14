# SPDX-License-Identifier: Apache-2.0
import json
import re
from html.parser import HTMLParser

import pytest

from llm_trainer.readers.thumbnails import write_thumbnail
from llm_trainer.report.charts import draw_lengths
from llm_trainer.report.history import read_history
from llm_trainer.report.page import compute_script_hash, write_report
from support.journals import HOSTILE, FakeJournal, write_long_job
from support.tiny_processors import draw


class Texts(HTMLParser):
    """The text of a page without its scripts and styles, and how many of each element it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.parts.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.parts).split())


def report_of(journal, folder):
    write_report(journal, folder)
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def long_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return report_of(write_long_job(folder / "metrics.jsonl", hours=6), folder), folder


def test_the_report_tells_the_outcome_and_the_figures(long_job):
    text = str(Texts(long_job[0]))
    for told in ("qwen3-8b-support-16gpu", "Done", "8.19 B parameters, 43.6 M trained", "2 hosts (ml.p5.48xlarge)"):
        assert told in text
    assert "Steps 10,000" in text
    assert "Instance hours 12.00" in text
    assert "Not set: mlflow_uri, packing." in text
    assert "Attempts 2" in text
    assert f"from the adapter of second {HOSTILE} (40 steps) after team/first" in text


def test_a_day_of_samples_and_ten_thousand_steps_stay_small(long_job):
    page, folder = long_job
    assert len(page.encode()) < 2_000_000
    assert len((folder / "curves.json").read_bytes()) < 1_000_000


def test_the_curves_are_written_as_json_and_image(long_job):
    _, folder = long_job
    curves = json.loads((folder / "curves.json").read_text(), parse_constant=pytest.fail)
    loss = curves["train_loss"]
    assert loss["step"][0] == 10
    assert 500 <= len(loss["step"]) == len(loss["mean"]) == len(loss["low"]) <= 1000
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.part"))


def test_what_the_data_say_is_text_and_never_markup(long_job):
    page, _ = long_job
    assert HOSTILE not in page
    assert str(Texts(page)).count(" ".join(HOSTILE.split())) >= 10  # settings, sources, prompts, answers, an event
    assert Texts(page).tags.count("script") == 3  # the charts' figures, the library, and what draws
    assert "Größe 模型 🚀" in page


def test_only_the_pages_own_scripts_may_run_and_nothing_may_be_fetched(long_job):
    page, _ = long_job
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert [f"'{compute_script_hash(script)}'" in policy.replace("&#43;", "+") for script in scripts] == [True, True]
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page.replace(scripts[0], ""))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rewards/accuracies": 0.8, "eval_rewards/accuracies": 0.75}, "Pairs ranked right 75"),
        ({"rewards/accuracies": 0.8}, "Pairs ranked right 80"),
        ({"train_token_accuracy": 0.8, "eval_mean_token_accuracy": 0.7}, "Token accuracy 70"),
    ],
)
def test_the_accuracy_of_an_evaluation_comes_before_that_of_the_training(tmp_path, values, told):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(1, "metrics", step=1, total_steps=1, epoch=1.0, values=values)
    assert told in str(Texts(report_of(journal.write(), tmp_path)))


def test_the_figures_of_the_charts_are_valid_json_without_nan(long_job):
    figures = re.search(r'<script type="application/json" id="drawings">(.*?)</script>', long_job[0], re.DOTALL)[1]
    drawings = json.loads(figures, parse_constant=pytest.fail)
    assert {"loss", "learning_rate", "mfu", "gpu-utilization_percent", "host-cpu_percent", "lengths", "timeline"} <= (
        drawings.keys()
    )
    assert drawings["gpu-utilization_percent"]["kind"] == "heat"
    assert len(drawings["gpu-utilization_percent"]["rows"]) == 16
    assert drawings["host-cpu_percent"]["kind"] == "lines"


@pytest.mark.parametrize("content", ["", '{"time": 1790000000.0, "kind": "job"}\n', '{"time": 1790000000.0, "ki'])
def test_a_journal_with_next_to_nothing_gives_a_report(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    text = str(Texts(report_of(tmp_path / "metrics.jsonl", tmp_path)))
    assert "Training job" in text
    assert "Unfinished" in text


def test_no_journal_gives_a_report(tmp_path):
    assert "Unfinished" in str(Texts(report_of(tmp_path / "none.jsonl", tmp_path / "data")))


def test_a_job_that_failed_in_its_first_second_tells_why(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    job = {"name": None, "arn": None, "hosts": ["algo-1"], "world_size": 1, "settings": {"lora_r": "four"}}
    journal.add(0, "job", **job, environment=None, attempt=1)
    journal.add(0.4, "end", status="failed", reason="lora_r='four' is not valid: <give> a whole number.")
    text = str(Texts(report_of(journal.write(), tmp_path)))
    assert "Failed lora_r='four' is not valid: <give> a whole number." in text
    assert "before it logged figures" in text


@pytest.mark.parametrize(
    "kind",
    ["job", "data", "model", "metrics", "system", "phase", "checkpoint", "generation", "event", "manifest", "end"],
)
def test_any_kind_of_record_may_be_missing(tmp_path, kind):
    journal = tmp_path / "metrics.jsonl"
    write_long_job(journal, num_hosts=1, num_gpus=1, num_steps=100, hours=0.6)
    lines = [line for line in journal.read_text().splitlines() if json.loads(line)["kind"] != kind]
    journal.write_text("\n".join(lines) + "\n")
    assert "What slowed the job down" in report_of(journal, tmp_path)


def test_a_later_report_replaces_an_earlier_one(tmp_path):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(0, "end", status="stopped", reason="SIGTERM")
    assert "Stopped" in report_of(journal.write(), tmp_path)
    journal.add(1, "end", status="done", reason=None)
    assert "Stopped" not in str(Texts(report_of(journal.write(), tmp_path)))


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [
        ({"39": 31, "40": 1}, [str(length) for length in range(1, 41)]),
        ({"21": 5, "42": 9, "4200": 1}, ["1-105", "106-210"]),  # the journal's own bins, 21 tokens wide
    ],
)
def test_the_histogram_splits_no_bin_of_the_journal(tmp_path, lengths, labels):
    journal = FakeJournal(tmp_path / "metrics.jsonl")
    journal.add(0, "data", split="train", rows=32, tokens=900, supervised_tokens=9, lengths=lengths)
    (chart,) = draw_lengths(read_history(journal.write()))
    assert chart.data["labels"][: len(labels)] == labels
    assert sum(chart.data["series"][0]["values"]) == pytest.approx(100, abs=0.01)


class Images(HTMLParser):
    """The source and the alternative text of each image of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append((dict(attrs)["src"], dict(attrs)["alt"]))


def shown(name="cat.png", **fields):
    return {"name": name, "start": 3, "tokens": 9, "width": 40, "height": 30, **fields}


def write_images(folder, images, sample=None):
    journal = FakeJournal(folder / "metrics.jsonl")
    data = {"split": "train", "rows": 1, "tokens": 9, "supervised_tokens": 3, "lengths": {}, "summary": {}}
    journal.add(1, "data", **data, **({"sample": sample} if sample else {}))
    texts = {name: name for name in ("split", "prompt", "reference", "before", "after")}
    journal.add(2, "generation", **texts, images=images)
    return report_of(journal.write(), folder)


def test_images_of_prompts_and_of_one_row_stand_in_the_page(tmp_path):
    uri = write_thumbnail(draw(400, 300))
    sample = {"text": "<image> ⟦yes⟧", "images": [shown("dog.png", thumbnail=uri)]}
    page = write_images(tmp_path, [shown(thumbnail=uri), shown("far.png")], sample)
    words = "40 x 30 pixels, 9 tokens from token 3 on"
    assert Images(page).found == [(uri, f"dog.png, {words}"), (uri, f"cat.png, {words}")]
    assert f"far.png, {words}" in str(Texts(page)) and "<image> ⟦yes⟧" in str(Texts(page))
    assert "img-src data:;" in page
    assert 'number">Images</th>' in page and 'number">Images</th>' not in write_images(tmp_path, [])


@pytest.mark.parametrize(
    "images",
    [
        [shown(thumbnail="https://example.com/cat.jpg")],
        [shown(thumbnail='data:image/jpeg;base64,AAAA" onerror="alert(1)')],
        [shown(thumbnail="data:image/jpeg;base64," + "A" * 200_000)],
        [shown(thumbnail=7), "cat.png", None],
        "cat.png",
    ],
    ids=["address", "markup", "huge", "odd", "no list"],
)
def test_what_is_no_thumbnail_is_never_loaded(tmp_path, images):
    assert Images(write_images(tmp_path, images)).found == []


def test_the_names_of_images_are_text(tmp_path):
    page = write_images(tmp_path, [shown(HOSTILE, thumbnail=write_thumbnail(draw(9, 9)))])
    ((_, words),) = Images(page).found
    assert HOSTILE not in page and words.startswith(HOSTILE)
