#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write code/llm_trainer/planning/instances.json: SageMaker's training instance types, with what EC2 says of each.

    .venv-supply/bin/python docker/instance_facts.py        `make instance-facts`

moto carries EC2's own answers to DescribeInstanceTypes, botocore SageMaker's list of types. Both are pinned.
"""

import datetime
import gzip
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CODE = Path(__file__).parents[1] / "code/llm_trainer"
OUTPUT = CODE / "planning/instances.json"
GPUS = CODE / "model/memory/gpus.json"
PACKAGES = ("moto", "botocore")
NO_CUDA = "its accelerators, {}, have no CUDA"
NO_DATA = "EC2's data in moto does not list it"
NO_KERNELS = "the image's torch has no kernels for its GPU, {}"
OTHER_CODE = "the image is for x86-64, and its CPU is {}"
PART_OF_GPU = "it has a part of a GPU, {}"
# torch's builds for CUDA 13, which the image has, begin at compute capability 7.5.
OLD_FAMILIES = {"ml.p2": "K80", "ml.p3": "V100", "ml.p3dn": "V100"}


def main() -> None:
    """Write the file anew, and tell what it leaves out."""
    table = make_table()
    OUTPUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    left_out = "".join(f"\n  {name}: {reason}" for name, reason in table["left_out"].items())
    print(f"{len(table['types'])} types with GPUs, {len(table['without_gpu'])} without. Left out:{left_out}")


def make_table() -> dict[str, Any]:
    """Return the content of the file, by the packages that are installed."""
    gpus = json.loads(GPUS.read_text(encoding="utf-8"))
    return {**describe_origin(), **gather_facts(list_training_types(), read_ec2_facts(), gpus)}


def describe_origin() -> dict[str, Any]:
    """Return today's date and the versions of the packages."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"made_on": datetime.datetime.now(datetime.UTC).date().isoformat(), "sources": versions}


def list_training_types() -> list[str]:
    """Return the instance types that CreateTrainingJob takes."""
    model = read_packed("botocore", "botocore/data/sagemaker/2017-07-24/service-2.json.gz")
    return model["shapes"]["TrainingInstanceType"]["enum"]


def read_ec2_facts() -> dict[str, dict[str, Any]]:
    """Return EC2's answer for each instance type by its name."""
    return read_packed("moto", "moto/ec2/resources/instance_types.json.gz")


def read_packed(package: str, file: str) -> dict[str, Any]:
    """Return the content of a package's compressed JSON file."""
    path = importlib.metadata.distribution(package).locate_file(file)
    return json.loads(gzip.decompress(Path(str(path)).read_bytes()))


def gather_facts(names: Iterable[str], ec2: Mapping[str, Any], gpus: Mapping[str, Any]) -> dict[str, Any]:
    """Return each type in one of three places: types, left_out with the reason, without_gpu."""
    content: dict[str, Any] = {"types": {}, "left_out": {}, "without_gpu": []}
    for name in sorted(names, key=split_name):
        facts = ec2.get(name.removeprefix("ml."))
        if reason := find_reason_against(name, facts):
            content["left_out"][name] = reason
        elif "GpuInfo" not in facts:
            content["without_gpu"].append(name)
        else:
            content["types"][name] = describe_type(facts, gpus)
    return content


def split_name(name: str) -> tuple[str, int, str]:
    """Return what sorts the types of a family by their size."""
    family, _, size = name.rpartition(".")
    number = re.match(r"\d+", size)
    return family, int(number[0]) if number else size.endswith("xlarge"), size


def find_reason_against(name: str, facts: Mapping[str, Any] | None) -> str | None:
    """Return why nothing can be planned for a type, else None."""
    if old := OLD_FAMILIES.get(name.rpartition(".")[0]):
        return NO_KERNELS.format(old)
    if facts is None:
        return NO_DATA
    if devices := facts.get("NeuronInfo", {}).get("NeuronDevices"):
        return NO_CUDA.format(devices[0]["Name"])
    return next((find_reason_against_gpu(gpu, facts) for gpu in facts.get("GpuInfo", {}).get("Gpus", [])), None)


def find_reason_against_gpu(gpu: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """Return why nothing can be planned for a type with this GPU, else None."""
    if gpu["Manufacturer"] != "NVIDIA":
        return NO_CUDA.format(gpu["Name"])
    if gpu.get("GpuPartitionSize", 1) < 1:  # as g6f's: EC2 gives its count as 0, and its memory as the part's
        return PART_OF_GPU.format(gpu["Name"])
    if "x86_64" not in facts["ProcessorInfo"]["SupportedArchitectures"]:
        return OTHER_CODE.format(facts["ProcessorInfo"]["SupportedArchitectures"][0])
    return None


def describe_type(facts: Mapping[str, Any], gpus: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file holds of a type. Ends the program for a GPU that gpus.json lacks."""
    (gpu,) = facts["GpuInfo"]["Gpus"]
    return {
        "gpu": find_gpu(gpu["Name"], gpu["MemoryInfo"]["SizeInMiB"], gpus),
        "num_gpus": gpu["Count"],
        "num_vcpus": facts["VCpuInfo"]["DefaultVCpus"],
        "memory_mib": facts["MemoryInfo"]["SizeInMiB"],
        "local_disk_gb": facts.get("InstanceStorageInfo", {}).get("TotalSizeInGB", 0),
        "network_gbits_a_second": measure_network(facts["NetworkInfo"]),
        "num_efa": facts["NetworkInfo"].get("EfaInfo", {}).get("MaximumEfaInterfaces", 0),
    }


def find_gpu(name: str, memory_mib: int, gpus: Mapping[str, Any]) -> str:
    """Return the name in gpus.json for the GPU that EC2 names so. Ends the program where there is none."""
    for known, facts in gpus.items():
        if facts["ec2"] == [name, memory_mib]:
            return known
    sys.exit(f"EC2 names a GPU {name} with {memory_mib} MiB: add it to {GPUS}.")


def measure_network(info: Mapping[str, Any]) -> float:
    """Return the Gbit a second that a host may send for as long as it likes.

    That is the rating, such as `4x 100 Gigabit`. For `Up to 25 Gigabit`, which is for minutes, it is what the network
    card may send always. The sum over cards is not taken: for g6e and p6 it is not the rating.
    """
    rating = info["NetworkPerformance"]
    if rating.startswith("Up to"):
        return sum(card["BaselineBandwidthInGbps"] for card in info["NetworkCards"])
    cards, gbits = re.fullmatch(r"(?:(\d+)x )?([\d.]+) Gigabit", rating).groups()
    return float(cards or 1) * float(gbits)


if __name__ == "__main__":
    main()
