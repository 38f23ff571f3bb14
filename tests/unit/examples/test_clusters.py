# SPDX-License-Identifier: Apache-2.0
"""The examples for clusters have only fields that the services know, and words that our commands take."""

import json
import subprocess

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

from llm_trainer.config.schema import FIELDS
from llm_trainer.job.job import parse_arguments
from support.measures import ROOT

EXAMPLES = ROOT / "examples"
FOLDERS = {"data_dir", "output_dir"}
# Pieces of the schemas in kubeflow.org_pytorchjobs (training-operator 1.9) and trainer.kubeflow.org_* (trainer 2): the
# fields that each object may have, and with ! those that it must. Both files were checked by the whole schemas, too.
POD_TEMPLATE = {"spec": {"terminationGracePeriodSeconds": int, "containers!": [{}], "volumes": [{}]}}
REPLICA = {"replicas": int, "restartPolicy": str, "template": POD_TEMPLATE}
RUN_POLICY = {"cleanPodPolicy": str, "backoffLimit": int}
JOB_SET = {"name!": str, "template!": {"metadata": {"labels!": {}}, "spec!": {"template!": POD_TEMPLATE}}}
SCHEMAS = {
    "PyTorchJob": {
        "pytorchReplicaSpecs!": {"Master!": REPLICA, "Worker": REPLICA},
        "runPolicy": RUN_POLICY,
        "nprocPerNode": str,
    },
    "TrainingRuntime": {
        "mlPolicy": {"numNodes": int, "torch": {}},
        "template!": {"spec": {"replicatedJobs": [JOB_SET]}},
    },
    "TrainJob": {
        "runtimeRef!": {"name!": str, "apiGroup": str, "kind": str},
        "trainer": {"numNodes": int, "args": [str], "env": [{}], "resourcesPerNode": {}},
    },
}
DOCUMENTS = [
    document for file in sorted(EXAMPLES.glob("kubernetes/*.yaml")) for document in yaml.safe_load_all(file.read_text())
]


def find_faults(value, schema, place=""):
    """Yield the place of each field that a schema does not know, lacks or has with another type."""
    if isinstance(schema, type):
        if not isinstance(value, schema):
            yield f"{place} is no {schema.__name__}"
    elif isinstance(schema, list):
        for number, item in enumerate(value):
            yield from find_faults(item, schema[0], f"{place}[{number}]")
    elif schema:
        fields = {name.rstrip("!"): part for name, part in schema.items()}
        yield from (f"{place}.{name} is unknown" for name in value.keys() - fields.keys())
        yield from (f"{place}.{name[:-1]} is missing" for name in schema if name[-1] == "!" and name[:-1] not in value)
        for name in value.keys() & fields.keys():
            yield from find_faults(value[name], fields[name], f"{place}.{name}")


def find_words(document):
    """Yield every list of arguments in an example."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if key in ("args", "command"):
            yield value
        elif isinstance(value, dict | list):
            yield from find_words(value)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_an_object_of_kubeflow_has_the_fields_of_its_definition(document):
    assert list(find_faults(document["spec"], SCHEMAS[document["kind"]])) == []
    versions = {"PyTorchJob": "kubeflow.org/v1"}
    assert document["apiVersion"] == versions.get(document["kind"], "trainer.kubeflow.org/v1alpha1")
    assert document["metadata"]["name"]


def test_faults_are_found():
    broken = {"pytorchReplicaSpecs": {"Worker": {"replicas": "1", "image": "x"}}}
    assert set(find_faults(broken, SCHEMAS["PyTorchJob"])) == {
        ".pytorchReplicaSpecs.Master is missing",
        ".pytorchReplicaSpecs.Worker.replicas is no int",
        ".pytorchReplicaSpecs.Worker.image is unknown",
    }


def test_aws_batch_takes_the_job_definition_by_its_own_model():
    definition = json.loads((EXAMPLES / "batch/job-definition.json").read_text())
    shape = botocore.session.get_session().get_service_model("batch").operation_model("RegisterJobDefinition")
    report = ParamValidator().validate(definition, shape.input_shape)
    assert not report.has_errors(), report.generate_report()


def test_every_word_is_one_of_ours():
    batch = json.loads((EXAMPLES / "batch/job-definition.json").read_text())
    found = [words for document in (*DOCUMENTS, batch) for words in find_words(document)]
    assert len(found) == 4  # two kinds of replicas, a TrainJob and a job definition
    for command, *words in found:
        assert command == "train"
        assert parse_arguments(words).keys() <= {*FIELDS, *FOLDERS}


def test_the_sbatch_script_is_sound():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm/train.sbatch")], check=True)
