# SPDX-License-Identifier: Apache-2.0
"""The table of instance types has every type that SageMaker trains on, or says why not."""

import re

import botocore
import botocore.session
import pytest

from llm_trainer.common.units import GIB
from llm_trainer.planning.instances import read_instances

FACTS = read_instances()


def test_no_type_that_botocore_lists_is_forgotten():
    model = botocore.session.get_session().get_service_model("sagemaker")
    known = {*FACTS.types, *FACTS.left_out, *FACTS.without_gpu}
    forgotten = set(model.shape_for("TrainingInstanceType").enum) - known
    assert not forgotten, f"`make instance-facts` adds {sorted(forgotten)}"


def test_a_type_stands_in_one_place():
    names = [*FACTS.types, *FACTS.left_out, *FACTS.without_gpu]
    assert len(names) == len(set(names))


def test_the_origin_is_told():
    assert FACTS.origin == (
        f"instance facts of {FACTS.made_on}, from moto {FACTS.sources['moto']} and botocore {botocore.__version__}"
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", FACTS.made_on)


# https://aws.amazon.com/sagemaker/ai/pricing and https://aws.amazon.com/ec2/instance-types
@pytest.mark.parametrize(
    ("name", "gpu", "num_gpus", "num_vcpus", "memory_gib", "disk_gb", "network_gbits", "num_efa"),
    [
        ("ml.g4dn.xlarge", "T4", 1, 4, 16, 125, 5, 0),
        ("ml.g5.12xlarge", "A10G", 4, 48, 192, 3800, 40, 1),
        ("ml.g6.2xlarge", "L4", 1, 8, 32, 450, 5, 0),
        ("ml.g6e.48xlarge", "L40S", 8, 192, 1536, 7600, 400, 4),
        ("ml.g7e.48xlarge", "RTX PRO 6000", 8, 192, 2048, 15200, 1600, 4),
        ("ml.p4d.24xlarge", "A100 40GB", 8, 96, 1152, 8000, 400, 4),
        ("ml.p4de.24xlarge", "A100 80GB", 8, 96, 1152, 8000, 400, 4),
        ("ml.g7.48xlarge", "RTX PRO 4500", 8, 192, 768, 7600, 700, 2),
        ("ml.p5.4xlarge", "H100", 1, 16, 256, 3800, 100, 1),
        ("ml.p5.48xlarge", "H100", 8, 192, 2048, 30400, 3200, 32),
        ("ml.p5e.48xlarge", "H200", 8, 192, 2048, 30400, 3200, 32),
        ("ml.p5en.48xlarge", "H200", 8, 192, 2048, 30400, 3200, 16),
        ("ml.p6-b200.48xlarge", "B200", 8, 192, 2048, 30400, 3200, 8),
        ("ml.p6-b300.48xlarge", "B300", 8, 192, 4096, 30400, 6400, 16),
    ],
)
def test_types_are_as_aws_tells(name, gpu, num_gpus, num_vcpus, memory_gib, disk_gb, network_gbits, num_efa):
    found = FACTS.types[name]
    assert (found.gpu.name, found.num_gpus, found.num_vcpus) == (gpu, num_gpus, num_vcpus)
    assert (found.memory_bytes, found.local_disk_bytes) == (memory_gib * GIB, disk_gb * 10**9)
    assert (found.network_bandwidth, found.num_efa) == (network_gbits * 1e9 / 8, num_efa)


def test_nvlink_is_between_gpus():
    assert FACTS.types["ml.p5.48xlarge"].nvlink_bandwidth == 450e9
    assert FACTS.types["ml.p5.4xlarge"].nvlink_bandwidth is None
    assert FACTS.types["ml.g5.48xlarge"].nvlink_bandwidth is None


def test_what_has_no_cuda_or_no_kernels_is_named():
    assert FACTS.left_out["ml.trn1.32xlarge"] == "its accelerators, Trainium, have no CUDA"
    assert FACTS.left_out["ml.p3.2xlarge"] == "the image's torch has no kernels for its GPU, V100"
    assert all(found.gpu.capability >= (7, 5) for found in FACTS.types.values())
