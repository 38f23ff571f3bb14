# SPDX-License-Identifier: Apache-2.0
"""A model.tar.gz is unpacked once, whole or not at all, and never out of its folder or beyond the disk."""

import io
import tarfile
import tempfile

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.job.inputs import find_warnings
from llm_trainer.job.job import check_job
from llm_trainer.job.model_archive import find_archive, unpack_archive
from llm_trainer.job.model_place import locate_model
from support.small_disk import small_disk


@pytest.fixture(autouse=True)
def temp_dir(tmp_path, monkeypatch):
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def pack(tmp_path):
    def write(*members: tarfile.TarInfo | str, name: str = "model.tar.gz"):
        archive = tmp_path / "channel" / name
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as stream:
            for member in members:
                info = tarfile.TarInfo(member) if isinstance(member, str) else member
                info.size = 2 if info.isreg() else 0
                stream.addfile(info, io.BytesIO(b"{}") if info.isreg() else None)
        return archive

    return write


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_an_archive_is_unpacked_once(pack, temp_dir):
    archive = pack("config.json", "model.safetensors")
    assert find_archive(archive) == find_archive(archive.parent) == archive
    folder = unpack_archive(archive)
    assert folder.is_relative_to(temp_dir)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    (folder / "mark").touch()
    assert (unpack_archive(archive) / "mark").exists()
    assert locate_model(str(archive.parent)) == str(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_the_model_in_it_may_lie_deeper(pack):
    assert locate_model(str(pack("./model/config.json"))).endswith("/model")


def test_sagemakers_archive_wins_over_others(pack):
    pack("a", name="output.tar.gz")
    archive = pack("config.json")
    assert find_archive(archive.parent) == archive
    archive.unlink()
    pack("b", name="other.tgz")
    with pytest.raises(UserError, match=r"holds 2 archives \(other\.tgz, output\.tar\.gz\): leave one there"):
        find_archive(archive.parent)


def test_an_archive_beside_a_model_is_no_model(pack):
    archive = pack("config.json")
    (archive.parent / "config.json").write_text("{}")
    assert find_archive(archive.parent) is None


@pytest.mark.parametrize(
    "member",
    ["../victim", link("a", "/etc/passwd"), link("b", "../../x"), "a/../../victim"],
    ids=["file above", "link elsewhere", "link above", "hidden way above"],
)
def test_what_leads_out_of_the_folder_is_refused(pack, tmp_path, temp_dir, member):
    archive = pack("config.json", member)
    with pytest.raises(UserError, match=r"model\.tar\.gz is refused \(.*\): pack the model's files alone"):
        unpack_archive(archive)
    assert not list(temp_dir.rglob("config.json"))
    assert not (temp_dir / "victim").exists()


def test_a_device_is_refused(pack):
    member = tarfile.TarInfo("tty")
    member.type = tarfile.CHRTYPE
    with pytest.raises(UserError, match="is refused"):
        unpack_archive(pack(member))


DAMAGES = {
    "checksum": lambda content: content[:-4],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "other": lambda content: b"no archive" * 99,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_told_and_leaves_nothing(pack, temp_dir, damage):
    archive = pack(*(f"file-{number}" for number in range(99)))
    archive.write_bytes(DAMAGES[damage](archive.read_bytes()))
    with pytest.raises(UserError, match=r"model\.tar\.gz is no whole tar archive \(.*\): upload it again"):
        unpack_archive(archive)
    assert not [path for path in temp_dir.rglob("*") if path.is_file()]


def test_an_archive_that_is_larger_than_the_disk_is_told_before_it_fills_it(tmp_path, monkeypatch):
    archive = tmp_path / "bomb.tar.gz"
    with tarfile.open(archive, "w:gz") as stream:
        member = tarfile.TarInfo("model.safetensors")
        member.size = 4 << 20
        stream.addfile(member, io.BytesIO(bytes(member.size)))
    with small_disk(tmp_path / "disk", 1024) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(UserError, match=r"unpacks to 4 MiB and more, and 1 MiB are left in .*: raise Vol"):
            unpack_archive(archive)


def test_another_users_folder_is_not_used(pack, temp_dir):
    archive = pack("config.json")
    folder = unpack_archive(archive).parent
    folder.chmod(0o777)
    with pytest.raises(UserError, match="belongs to another user, or others may write to it"):
        unpack_archive(archive)


def test_a_job_starts_from_the_archive_of_another(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    channel = tree.base_dir / "input/data/model"
    archive = tree.base_dir / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as stream:
        stream.add(channel, ".")
    for file in channel.iterdir():
        file.unlink()
    archive.rename(channel / "model.tar.gz")
    job = check_job(read_environment(), [])
    texts = list(find_warnings(job.settings, job.environment, job.inputs))
    assert f"the model is read from {job.inputs.model}, as {channel} is no model's folder itself." in texts
    with pytest.raises(UserError, match="Hyperparameter 'nonsense'") as information:
        check_job(read_environment(), ["--nonsense", "1"])
    assert len(information.value.problems) == 1  # nothing is said of a model that is not unpacked yet
