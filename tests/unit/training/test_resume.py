# SPDX-License-Identifier: Apache-2.0
"""A job goes on from a checkpoint of its own run, and from no other."""

import json
import socket

import pytest
import torch.distributed as dist
import torch.multiprocessing
import xxhash
from trl import SFTConfig

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.report import DataReport
from llm_trainer.job import checkpoint_dir
from llm_trainer.training import resume
from llm_trainer.training.packing import Packing
from llm_trainer.training.resume import RunParts

RUN = {"lora_r": 8, "learning_rate": 0.01, "rows a step": 16}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        partial = checkpoint_dir.find_partial_dir(tmp_path) / f"checkpoint-{step}"
        partial.mkdir(parents=True)
        (partial / "trainer_state.json").write_text("{}")
        checkpoint_dir.complete_checkpoint(
            partial, RUN, 0, False, checkpoint_dir.describe_files(partial, checkpoint_dir.list_files(partial))
        )
    return tmp_path


def choose(folder, run=RUN, resume_from_checkpoint=None, use_checkpoints=True):
    settings = Settings(resume_from_checkpoint=resume_from_checkpoint, use_checkpoints=use_checkpoints)
    return resume.choose_checkpoint(settings.training, folder, run)


def test_the_distribution_is_that_of_the_newest_that_tells(folder):
    def find(**settings):
        settings = {"resume_from_checkpoint": None, "use_checkpoints": True, **settings}
        return resume.find_distribution(Settings(**settings).training, folder, None)

    assert find() is None  # a run of before, whose markers do not tell
    for step, distribution in ((3, "ddp"), (4, "fsdp")):
        partial = checkpoint_dir.find_partial_dir(folder) / f"checkpoint-{step}"
        partial.mkdir(parents=True)
        checkpoint_dir.complete_checkpoint(partial, {**RUN, "distribution": distribution}, 0, False, {})
    assert find() == "fsdp"
    (folder / "checkpoint-4" / checkpoint_dir.MARKER).write_text("half")
    assert find() == "ddp"
    assert find(resume_from_checkpoint="false") is None
    assert find(use_checkpoints=False) is None


@pytest.mark.parametrize("wish", [None, "true", "True"])
def test_the_newest_is_taken_up(folder, wish):
    assert choose(folder, resume_from_checkpoint=wish) == folder / "checkpoint-2"


def test_none_is_taken_up_where_the_user_wants_none(folder):
    assert choose(folder, resume_from_checkpoint="false") is None
    assert choose(folder, use_checkpoints=False) is None
    assert choose(folder / "empty") is None


def test_an_older_one_is_taken_up_by_name(folder):
    assert choose(folder, resume_from_checkpoint=str(folder / "checkpoint-1")) == folder / "checkpoint-1"


def test_a_start_from_elsewhere_is_not_made_again_after_an_interruption(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("channel") / "checkpoint-9"
    elsewhere.mkdir()
    (elsewhere / "trainer_state.json").write_text("{}")
    assert choose(folder / "empty", resume_from_checkpoint=str(elsewhere)) == elsewhere
    assert choose(folder, resume_from_checkpoint=str(elsewhere)) == folder / "checkpoint-2"


def test_a_broken_one_is_refused_by_name(folder):
    (folder / "checkpoint-1/trainer_state.json").unlink()
    with pytest.raises(
        UserError, match=r"checkpoint-1' is not a complete checkpoint \(trainer_state.json is missing\)"
    ):
        choose(folder, resume_from_checkpoint=str(folder / "checkpoint-1"))
    with pytest.raises(UserError, match=r"is not a complete checkpoint \(it has no trainer_state.json\)"):
        choose(folder, resume_from_checkpoint=str(folder / "checkpoint-7"))


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "null", '{"global_step": 1'], ids=["empty", "deep", "null", "cut"]
)
def test_another_tools_state_that_cannot_be_read_is_refused(folder, content):
    state = folder / "checkpoint-7/trainer_state.json"
    state.parent.mkdir()
    state.write_text(content)
    with pytest.raises(UserError, match=r"is not a complete checkpoint \(its trainer_state.json (is|nests|holds) "):
        choose(folder, resume_from_checkpoint=str(state.parent))


def test_one_of_another_run_is_refused_with_what_differs(folder):
    differs = r"another run \(lora_r was 8 and is 4; rows a step was 16 and is 32\): change that back"
    with pytest.raises(UserError, match=differs):
        choose(folder, run={**RUN, "lora_r": 4, "rows a step": 32})


def identify(folder, **given):
    (folder / "config.json").write_text("{}")
    settings, arguments = Settings(**given), SFTConfig(output_dir=str(folder), use_cpu=True, report_to="none")
    sections = (settings.model, settings.adapter, settings.data, str(folder))
    return resume.identify_run(RunParts(*sections, DataReport(), Packing("off", ""), sharded=False), arguments)


@pytest.mark.parametrize(
    "changed",
    [{"train_vision": True}, {"image_processor_options": {"max_pixels": 784}}, {"load_in_4bit": True}],
    ids=str,
)
def test_a_model_that_is_trained_or_sees_otherwise_is_another_run(tmp_path, changed):
    before, after = identify(tmp_path), identify(tmp_path, **changed)
    assert {name for name in before if before[name] != after[name]} == {*changed}


STEP = "checkpoint-3"
FILES = {"shard-0": b"zero" * 100, "below/shard-1": b"one" * 100}


def write_shards(folder, name, own, contents=FILES):
    """One host's part of a checkpoint, whose marker lists the files of both."""
    partial = checkpoint_dir.find_partial_dir(folder) / name
    for file in own:
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        (partial / file).write_bytes(contents[file])
    files = {file: (len(content), xxhash.xxh3_64(content).hexdigest()) for file, content in contents.items()}
    return checkpoint_dir.complete_checkpoint(partial, RUN, 0, False, files)


def find(folder, group):
    settings = Settings(resume_from_checkpoint=None, use_checkpoints=True)
    found = resume.find_checkpoint(settings.training, folder, RUN, group, folder / "saved")
    return found and found.name, checkpoint_dir.find_fault(found) if found else None


def each_its_own_shard(number, folder):
    write_shards(folder, STEP, list(FILES)[number : number + 1])


def the_second_alone_has_it(number, folder):
    if number == 1:
        write_shards(folder, STEP, FILES)


def the_second_has_an_old_one(number, folder):
    contents = FILES if number == 0 else {name: content[::-1] for name, content in FILES.items()}
    write_shards(folder, STEP, FILES, contents)


def nobody_has_a_shard_of_the_newest(number, folder):
    each_its_own_shard(number, folder)
    newest = write_shards(folder, "checkpoint-4", list(FILES)[number : number + 1])
    (newest / "shard-0").unlink(missing_ok=True)


CASES = (each_its_own_shard, the_second_alone_has_it, the_second_has_an_old_one, nobody_has_a_shard_of_the_newest)


def find_as_host(number, folder):
    """What the only rank of a host finds in each case; a folder a host."""
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("RANK", str(number))
        dist.init_process_group("gloo")
        group, results = dist.new_group(backend="gloo"), {}
        for case in CASES:
            host_folder = folder / case.__name__ / str(number)
            host_folder.mkdir(parents=True)
            case(number, host_folder)
            dist.barrier()
            results[case.__name__] = find(host_folder, group)
        (folder / f"{number}.json").write_text(json.dumps(results))
        dist.destroy_process_group()


@pytest.mark.long
def test_all_hosts_come_to_have_the_newest_checkpoint_that_they_have_together(tmp_path, monkeypatch, capfd):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    torch.multiprocessing.start_processes(find_as_host, (tmp_path,), nprocs=2, start_method="fork")
    for number in range(2):
        results = json.loads((tmp_path / f"{number}.json").read_text())
        assert results == {case.__name__: [STEP, None] for case in CASES}
    assert capfd.readouterr().out.count("checkpoint-4 is left out, shard-0 is missing") == 1


def test_a_run_goes_on_from_a_checkpoint_of_the_other_distribution(folder):
    for step in (1, 2):
        marker = json.loads((folder / f"checkpoint-{step}/complete.json").read_text())
        marker["run"]["distribution"] = "ddp"
        (folder / f"checkpoint-{step}/complete.json").write_text(json.dumps(marker))
    assert choose(folder, run={**RUN, "distribution": "fsdp"}) == folder / "checkpoint-2"


def test_a_merged_adapter_is_another_beginning_than_one_that_is_trained_on():
    assert resume.describe_adapter("0123456789abcdef", is_merged=False) == "0123456789ab"
    assert resume.describe_adapter("0123456789abcdef", is_merged=True) == "0123456789ab, merged"
    assert resume.describe_adapter(None, is_merged=False) is None
