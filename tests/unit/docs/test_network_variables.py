# SPDX-License-Identifier: Apache-2.0
"""The table of network variables in docs/hosts.md and the code agree, and neither goes by an instance type."""

import dataclasses
import re
from pathlib import Path

import pytest

from llm_trainer.config.environment import read_environment
from llm_trainer.launcher.worker_processes import WorkerProcesses
from support.measures import ROOT

VARIABLE = r"(?:NCCL|GLOO|TORCH_NCCL|TORCH_FR|TORCH_GLOO|TORCH_DIST|FI|OFI_NCCL|RDMAV)_[A-Z0-9_]+"
CODE = [file.read_text(encoding="utf-8") for file in (ROOT / "code/llm_trainer").rglob("*.py")]
DOCUMENT = (ROOT / "docs/hosts.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^## Variables of the network$.*?(?=^## )", DOCUMENT, re.MULTILINE | re.DOTALL)
DESCRIBED = dict(re.findall(rf"^\| `({VARIABLE})` \| (.*) \|$", SECTION, re.MULTILINE))


def test_the_table_has_every_variable_that_the_code_names():
    # FI_EP_RDM is the kind of endpoint that fi_info is asked for.
    named = {name for text in CODE for name in re.findall(rf'"({VARIABLE})"', text)}
    assert named - {"FI_EP_RDM"} == set(DESCRIBED) | {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
    assert "`TORCH_NCCL_DEBUG_INFO_TEMP_FILE`" in DESCRIBED["TORCH_FR_DUMP_TEMP_FILE"]


@pytest.mark.parametrize("plugin", [None, "libnccl-net.so", "libnccl-net-ofi.so"])
def test_workers_get_what_the_table_says_and_nothing_else(tmp_path, monkeypatch, plugin):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr("llm_trainer.host.network.find_efa_devices", lambda folder: ["rdmap0"])
    monkeypatch.setattr("llm_trainer.host.network.find_verbs_devices", lambda folder: ["uverbs0"])
    if plugin:
        (tmp_path / plugin).touch()
    environment = dataclasses.replace(
        read_environment(), hosts=("127.0.0.1", "localhost"), current_host="127.0.0.1", network_interface="lo"
    )
    variables = WorkerProcesses(environment, 8, on_gpu=True, host_timeout_seconds=900.0).build_variables(
        tmp_path, 0.0, {}
    )
    chosen = {None: {"NCCL_NET"}, "libnccl-net-ofi.so": {"NCCL_NET_PLUGIN"}}.get(plugin, set())
    set_here = {name for name in variables if re.fullmatch(VARIABLE, name)}
    assert set_here == set(DESCRIBED) - {"NCCL_NET", "NCCL_NET_PLUGIN"} | chosen
    values = {"NCCL_NET": "Socket", "NCCL_NET_PLUGIN": "ofi", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    for name in set_here & set(values):
        assert variables[name] == values[name]
        assert DESCRIBED[name].startswith(f"`{values[name]}` |")
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/output/data/collectives-rank-"


def test_no_network_setting_goes_by_an_instance_type():
    folders = [ROOT / "code/llm_trainer" / name for name in ("host", "launcher", "job", "config")]
    texts = {file: file.read_text(encoding="utf-8") for folder in folders for file in Path(folder).rglob("*.py")}
    named = {str(file): re.findall(r"\bml\.|\b[a-z]\d[a-z]*\.\d*xlarge", text) for file, text in texts.items()}
    assert {file: found for file, found in named.items() if found} == {}
    assert "xlarge" not in SECTION
