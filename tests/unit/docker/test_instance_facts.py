# SPDX-License-Identifier: Apache-2.0
"""docker/instance_facts.py: what it makes of EC2's answers and of SageMaker's list."""

import json
import sys

import pytest

from support.measures import ROOT

sys.path.append(str(ROOT / "docker"))
import instance_facts

GPUS = {"A100 40GB": {"ec2": ["A100", 40960]}}
CARD = {"BaselineBandwidthInGbps": 2.5}


def answer(network="4x 100 Gigabit", **more):
    return {
        "VCpuInfo": {"DefaultVCpus": 96},
        "MemoryInfo": {"SizeInMiB": 1179648},
        "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]},
        "NetworkInfo": {"NetworkPerformance": network, "NetworkCards": [CARD], "EfaInfo": {"MaximumEfaInterfaces": 4}},
        **more,
    }


def gpu(name="A100", memory_mib=40960, maker="NVIDIA", **more):
    facts = {"Name": name, "Manufacturer": maker, "Count": 8, "MemoryInfo": {"SizeInMiB": memory_mib}, **more}
    return {"GpuInfo": {"Gpus": [facts]}}


def test_the_table_that_is_there_is_of_the_pinned_packages():
    written = json.loads(instance_facts.OUTPUT.read_text(encoding="utf-8"))
    made = instance_facts.make_table()
    for table in (written, made):
        del table["made_on"]
    assert written == made, "run `make instance-facts`"


def test_each_type_has_one_place():
    ec2 = {
        "p4d.24xlarge": answer(**gpu(), InstanceStorageInfo={"TotalSizeInGB": 8000}),
        "m5.large": answer(),
        "trn1.2xlarge": answer(NeuronInfo={"NeuronDevices": [{"Name": "Trainium"}]}),
        "p3dn.24xlarge": answer(**gpu("V100", 32768)),
    }
    names = ["ml.new.large", *(f"ml.{name}" for name in ec2)]
    assert instance_facts.gather_facts(names, ec2, GPUS) == {
        "types": {
            "ml.p4d.24xlarge": {
                "gpu": "A100 40GB", "num_gpus": 8, "num_vcpus": 96, "memory_mib": 1179648, "local_disk_gb": 8000,
                "network_gbits_a_second": 400.0, "num_efa": 4,
            }
        },
        "left_out": {
            "ml.new.large": "EC2's data in moto does not list it",
            "ml.p3dn.24xlarge": "the image's torch has no kernels for its GPU, V100",
            "ml.trn1.2xlarge": "its accelerators, Trainium, have no CUDA",
        },
        "without_gpu": ["ml.m5.large"],
    }  # fmt: skip


# As EC2 describes g6f.xlarge, g5g.xlarge and g4ad.xlarge: SageMaker lists none of them today.
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (gpu("L4", 2861, GpuPartitionSize=0.125, Count=0), "it has a part of a GPU, L4"),
        (
            {**gpu("T4g", 16384), "ProcessorInfo": {"SupportedArchitectures": ["arm64"]}},
            "the image is for x86-64, and its CPU is arm64",
        ),
        (gpu("Radeon Pro V520", 8192, "AMD"), "its accelerators, Radeon Pro V520, have no CUDA"),
    ],
)
def test_what_is_no_whole_gpu_for_this_image_is_left_out(facts, reason):
    gathered = instance_facts.gather_facts(["ml.x.large"], {"x.large": answer(**facts)}, GPUS)
    assert (gathered["types"], gathered["left_out"]) == ({}, {"ml.x.large": reason})


@pytest.mark.parametrize(("rating", "gbits"), [("25 Gigabit", 25), ("4x 100 Gigabit", 400), ("Up to 25 Gigabit", 2.5)])
def test_the_network_is_what_lasts(rating, gbits):
    assert instance_facts.measure_network(answer(rating)["NetworkInfo"]) == gbits


def test_a_new_gpu_is_asked_for():
    with pytest.raises(SystemExit, match=r"EC2 names a GPU X100 with 40960 MiB: add it to .*gpus\.json"):
        instance_facts.gather_facts(["ml.x.large"], {"x.large": answer(**gpu("X100"))}, GPUS)


def test_sizes_stand_in_their_order():
    names = ["ml.g5.12xlarge", "ml.g5.xlarge", "ml.g5.2xlarge", "ml.g5.large"]
    assert sorted(names, key=instance_facts.split_name) == ["ml.g5.large", "ml.g5.xlarge", "ml.g5.2xlarge", names[0]]
