# SPDX-License-Identifier: Apache-2.0
import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.rewards.choice import Choice, find_file, parse_choice, read_schema


@pytest.fixture
def channels(tmp_path):
    folders = {name: tmp_path / "data" / name for name in ("rewards", "config", "train")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return folders


def test_a_built_in_has_its_name_and_options(channels):
    assert parse_choice("regex", {"pattern": "x"}, channels) == Choice("regex", "regex", {"pattern": "x"})


@pytest.mark.parametrize("holders", [("rewards",), ("config",), ("rewards", "config")])
def test_a_file_is_found_in_the_channel_of_rewards_before_the_one_of_settings(channels, holders):
    for name in holders:
        (channels[name] / "mine").mkdir()
        (channels[name] / "mine/r.py").touch()
    choice = parse_choice("mine/r.py:score", {}, channels)
    assert choice == Choice("mine/r.py:score", "score", {}, channels[holders[0]] / "mine/r.py")


def test_a_function_is_told_by_what_is_in_its_file(channels):
    file = channels["rewards"] / "r.py"
    told = []
    for content in ("a = 1", "a = 2", "a = 1"):
        file.write_text(content)
        told.append(parse_choice("r.py:score", {}, channels).describe_content())
    assert told[0] == told[2] != told[1]
    assert told[0].startswith("r.py:score ")
    assert Choice("math", "math", {}).describe_content() == "math"


def test_an_absolute_path_may_lie_in_any_channel(channels):
    file = channels["train"] / "r.py"
    file.touch()
    assert parse_choice(f"{file}:score", {}, channels).file == file


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        ("mth", "the nearest is 'math'."),
        ("r.py", "names no function of the file: write r.py:NAME."),
        ("r.txt:score", "write it so, such as rewards.py:score."),
        ("r.py:a-b", "write it so, such as rewards.py:score."),
        (":score", "write it so, such as rewards.py:score."),
        ("../r.py:score", "write it without '.' and '..', from the channel's folder."),
        ("a/../../r.py:score", "write it without '.' and '..', from the channel's folder."),
        ("./r.py:score", "write it without '.' and '..', from the channel's folder."),
        ("/etc/r.py:score", "lies in no channel: put r.py into channel 'rewards' and name it there."),
    ],
)
def test_another_entry_is_refused(channels, entry, end):
    with pytest.raises(UserError) as error:
        parse_choice(entry, {}, channels)
    assert str(error.value).startswith(f"reward_functions={entry!r} ")
    assert str(error.value).endswith(end)


def test_a_missing_file_is_told_with_the_places_and_what_lies_there(channels):
    (channels["config"] / "score.py").touch()
    with pytest.raises(UserError) as error:
        parse_choice("r.py:score", {}, channels)
    assert str(error.value) == (
        "reward_functions='r.py:score' names a file that is not there: put it into "
        f"{channels['rewards']} or {channels['config']}, which have score.py."
    )
    with pytest.raises(UserError, match=r"give r.py as a file of channel 'rewards'\.$"):
        parse_choice("r.py:score", {}, {"train": channels["train"]})


def test_a_link_out_of_its_channel_is_refused_and_one_within_is_not(channels, tmp_path):
    (tmp_path / "outside.py").touch()
    (channels["rewards"] / "real.py").touch()
    (channels["rewards"] / "out.py").symlink_to(tmp_path / "outside.py")
    (channels["rewards"] / "in.py").symlink_to("real.py")
    with pytest.raises(UserError, match="is a link out of its channel: put the file itself there"):
        find_file("out.py", channels, "key")
    assert find_file("in.py", channels, "key") == channels["rewards"] / "in.py"


def test_a_path_that_leaves_its_channel_by_dots_is_refused(channels, tmp_path):
    (tmp_path / "outside.py").touch()
    with pytest.raises(UserError, match="is a link out of its channel"):
        find_file(f"{channels['rewards']}/../../outside.py", channels, "key")


def test_a_channel_may_itself_be_a_link(channels, tmp_path):
    (channels["rewards"] / "r.py").touch()
    (tmp_path / "linked").symlink_to(channels["rewards"])
    assert find_file("r.py", {"rewards": tmp_path / "linked"}, "key") == tmp_path / "linked/r.py"


def test_a_schema_is_read_from_its_file(channels):
    (channels["config"] / "s.json").write_text('{"type": "object"}')
    choice = read_schema(Choice("json_schema", "json_schema", {"schema": "s.json"}), channels)
    assert choice.options == {"schema": {"type": "object"}}
    given = Choice("json_schema", "json_schema", {"schema": {}})
    assert read_schema(given, channels) == given


@pytest.mark.parametrize(
    ("content", "reason"), [("[]", "holds a JSON list"), ("{", "is not valid JSON"), (None, "a file that is not there")]
)
def test_a_file_without_a_schema_is_refused(channels, content, reason):
    if content is not None:
        (channels["rewards"] / "s.json").write_text(content)
    with pytest.raises(UserError, match=rf"reward_options: json_schema: schema='s.json' .*{reason}"):
        read_schema(Choice("json_schema", "json_schema", {"schema": "s.json"}), channels)
