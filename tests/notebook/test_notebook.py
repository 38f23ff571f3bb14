# SPDX-License-Identifier: Apache-2.0
"""examples/model-trainer-ddp.ipynb, run from top to bottom against a stand-in for AWS on this machine.

`make test-notebook` runs this in an environment of its own. moto takes every request, and keeps those to SageMaker; a
proxy that answers nothing is told to whatever would leave the machine.
"""

import base64
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

MISSING = "the notebook's packages are not installed here: run `make test-notebook`"
boto3 = pytest.importorskip("boto3", reason=MISSING)
nbclient = pytest.importorskip("nbclient", reason=MISSING)
nbformat = pytest.importorskip("nbformat", reason=MISSING)
moto_server = pytest.importorskip("moto.server", reason=MISSING)
yaml = pytest.importorskip("yaml", reason=MISSING)
requests = pytest.importorskip("requests", reason=MISSING)

from moto.sagemaker.models import FakeEndpointConfig, sagemaker_backends  # noqa: E402 - after it is known to be there

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(900),  # a command takes seconds to start, where the machine is busy
    pytest.mark.skipif(not (REPOSITORY / ".venv/bin/llm-trainer").exists(), reason="run `make venv` first"),
]

NOTEBOOK = REPOSITORY / "examples/model-trainer-ddp.ipynb"
REGION, ACCOUNT = "us-west-2", "123456789012"  # moto's
BUCKET = "bucket-of-the-test"
HARDWARE = {"InstanceType": "ml.g6.12xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100}
SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:hugging-face-AbCdEf"
SERVING_ENV = "# For LMI.\nOPTION_ENGINE=Python\nOPTION_MODEL_ID=/opt/ml/model\nOPTION_OVERRIDES=a=b\n"
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "Because they can."}}]}
DOLLY = [
    {"instruction": f"Add {a} and {b}.", "context": "In words." if a else "", "response": f"{a + b} ", "category": "qa"}
    for a in range(5)
    for b in range(4)
]


class Aws:
    """moto's server, with what an account has before the notebook starts."""

    def __init__(self, folder: Path) -> None:
        self.server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.variables = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_CONFIG_FILE": str(folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def __enter__(self) -> "Aws":
        self.call_moto("reset")  # it keeps one account for the whole process
        return self

    def __exit__(self, *_: Any) -> None:
        self.call_moto("recorder/stop-recording")
        self.server.stop()

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def call_moto(self, path: str, **content: Any) -> str:
        response = requests.post(f"{self.url}/moto-api/{path}", **content, timeout=10)
        response.raise_for_status()
        return response.text

    def furnish(self) -> str:
        """A role, an image and an endpoint's answer; the image's digest."""
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        self.client("iam").create_role(RoleName="SageMakerTraining", AssumeRolePolicyDocument=document)
        self.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        ecr = self.client("ecr")
        ecr.create_repository(repositoryName="sagemaker-llm-trainer")
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {}, "layers": []})
        image = ecr.put_image(repositoryName="sagemaker-llm-trainer", imageTag="cuda", imageManifest=manifest)["image"]
        result = {"Body": json.dumps(ANSWER), "ContentType": "application/json"}
        self.call_moto("static/sagemaker/endpoint-results", json={"results": [result], "region": REGION})
        self.call_moto("recorder/start-recording")
        return image["imageId"]["imageDigest"]

    def finish_jobs(self) -> None:
        """What a job leaves in S3; moto's jobs are complete when they are created, and pack what they leave."""
        for name, job in sagemaker_backends[ACCOUNT][REGION].training_jobs.items():
            place = urlparse(f"{job.output_data_config['S3OutputPath']}/{name}/output/model")
            job.model_artifacts["S3ModelArtifacts"] = place.geturl()
            for file, content in (("serving.env", SERVING_ENV), ("model.safetensors", "weights")):
                self.client("s3").put_object(Bucket=place.netloc, Key=f"{place.path[1:]}/{file}", Body=content)

    def list_requests(self) -> list[tuple[str, dict[str, Any]]]:
        """SageMaker's operations with what was asked, in order; an endpoint's are called InvokeEndpoint."""
        found = []
        for line in requests.get(f"{self.url}/moto-api/recorder/download-recording", timeout=10).text.splitlines():
            entry = json.loads(line)
            body = base64.b64decode(entry["body"]) if entry["body_encoded"] else entry["body"]
            target = entry["headers"].get("X-Amz-Target", "")
            if target.startswith("SageMaker."):
                found.append((target.removeprefix("SageMaker."), json.loads(body)))
            elif entry["url"].endswith("/invocations"):
                found.append(("InvokeEndpoint", json.loads(body)))
        return found

    def list_files(self, uri: str) -> dict[str, bytes]:
        place, s3 = urlparse(uri), self.client("s3")
        listed = s3.list_objects_v2(Bucket=place.netloc, Prefix=place.path[1:].rstrip("/") + "/")["Contents"]
        return {
            Path(each["Key"]).name: s3.get_object(Bucket=place.netloc, Key=each["Key"])["Body"].read()
            for each in listed
        }


class Proxy:
    """Refuses whatever a process would send beyond this machine, and keeps its address."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        proxy = self

        class Refusal(http.server.BaseHTTPRequestHandler):
            def refuse(self) -> None:
                proxy.addresses.append(self.path)
                self.send_error(403)

            do_CONNECT = do_GET = do_POST = do_HEAD = do_PUT = refuse  # noqa: N815 - the names are http.server's

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.server.server_port}"
        self.variables = {key: url for name in ("HTTP_PROXY", "HTTPS_PROXY") for key in (name, name.lower())}
        self.variables |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Run:
    """A run of the notebook."""

    folder: Path
    notebook: Any
    aws: Aws
    requests: list[tuple[str, dict[str, Any]]]
    addresses_beyond: list[str]
    digest: str

    def find(self, operation: str) -> dict[str, Any]:
        """What was asked by the only request of this operation."""
        (asked,) = [asked for name, asked in self.requests if name == operation]
        return asked

    def read_output(self) -> str:
        outputs = [output for cell in self.notebook.cells for output in cell.get("outputs", [])]
        return "".join(output.get("text", "") for output in outputs)


def read_notebook(until: str | None, **parameters: Any) -> Any:
    """The notebook, with these parameters set after those of its own, as papermill does it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    if until:
        (last,) = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and until in cell.source]
        del notebook.cells[last + 1 :]
    return notebook


@contextmanager
def run_notebook(folder: Path, until: str | None = None, **parameters: Any) -> Iterator[Run]:
    """Run the notebook, or its cells up to the one that holds these words, with what it asked of AWS."""
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    (folder / "examples/dolly").mkdir(parents=True)
    (folder / "examples/dolly/rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in DOLLY))
    notebook = read_notebook(until, dataset_name="dolly", num_validation_rows=5, bucket=BUCKET, **parameters)
    with pytest.MonkeyPatch.context() as patch, Aws(folder) as aws, Proxy() as proxy:
        patch.chdir(folder)  # where moto's recorder writes
        patch.setattr(FakeEndpointConfig, "validate_instance_type", lambda *_: None)  # by a list without L4 and A10G
        digest = aws.furnish()
        variables = {
            **aws.variables,
            **proxy.variables,
            "HF_HOME": str(folder / "hf"),
            "IPYTHONDIR": str(folder / "ipython"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPOSITORY / "code"),
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder / "examples")}},
            on_cell_executed=lambda **_: aws.finish_jobs(),
        ).execute()
        yield Run(folder, notebook, aws, aws.list_requests(), proxy.addresses, digest)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with run_notebook(tmp_path_factory.mktemp("notebook"), hf_token_secret=SECRET) as run:
        yield run


def test_the_notebook_is_valid_and_carries_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_nothing_leaves_the_machine(run):
    assert run.addresses_beyond == []


def test_the_order_of_what_is_asked_of_sagemaker(run):
    asked = [name for name, _ in run.requests if not name.startswith(("Describe", "List"))]
    assert asked == [
        "CreateTrainingJob",
        "CreateModel",
        "CreateEndpointConfig",
        "CreateEndpoint",
        "InvokeEndpoint",
        "DeleteEndpoint",
        "DeleteEndpointConfig",
        "DeleteModel",
    ]


def test_the_job_runs_the_image_of_ecr_with_our_metric_definitions(run):
    job = run.find("CreateTrainingJob")
    algorithm = job["AlgorithmSpecification"]
    repository = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/sagemaker-llm-trainer"
    assert algorithm["TrainingImage"] == f"{repository}@{run.digest}"
    assert "ContainerEntrypoint" not in algorithm  # the image's own, which forwards signals
    definitions = {each["Name"]: each["Regex"] for each in algorithm["MetricDefinitions"]}
    assert {"train_loss", "eval_loss", "tokens_per_second"} < set(definitions)
    assert re.findall(definitions["train_loss"], "train_loss=0.5; step=3") == ["0.5"]
    assert job["RoleArn"] == f"arn:aws:iam::{ACCOUNT}:role/SageMakerTraining"


def test_the_job_has_its_channels_and_they_their_files(run):
    channels = {each["ChannelName"]: each for each in run.find("CreateTrainingJob")["InputDataConfig"]}
    assert set(channels) == {"train", "validation"}
    sources = {name: channel["DataSource"]["S3DataSource"] for name, channel in channels.items()}
    assert {source["S3DataDistributionType"] for source in sources.values()} == {"FullyReplicated"}
    files = {name: run.aws.list_files(source["S3Uri"]) for name, source in sources.items()}
    rows = {
        name: [json.loads(line) for line in files[name][f"{name}.jsonl"].splitlines()]
        for name in ("train", "validation")
    }
    assert (len(rows["train"]), len(rows["validation"])) == (15, 5)
    wanted = [
        {
            "messages": [
                {"role": "user", "content": "\n\n".join(filter(None, [row["instruction"], row["context"]]))},
                {"role": "assistant", "content": row["response"].strip()},
            ]
        }
        for row in DOLLY
    ]
    assert sorted(map(str, rows["train"] + rows["validation"])) == sorted(map(str, wanted))


def test_the_settings_are_the_jobs_and_a_secret_goes_by_reference(run):
    job = run.find("CreateTrainingJob")
    given = yaml.safe_load((run.folder / "examples/job/args.yaml").read_text())
    del given["job"]
    given["warmup_steps"] = given.pop("warmup_ratio")  # by the name that the job has for it
    assert {name: yaml.safe_load(value) for name, value in job["HyperParameters"].items()} == given
    assert job["Environment"]["HF_TOKEN"] == SECRET


def test_the_job_keeps_checkpoints_and_its_result_unpacked(run):
    job = run.find("CreateTrainingJob")
    output = job["OutputDataConfig"]
    assert output["S3OutputPath"] == f"s3://{BUCKET}/output"
    assert re.fullmatch(r"dolly-lora-[\d-]+", job["TrainingJobName"])
    assert output["CompressionType"] == "NONE"
    assert job["CheckpointConfig"] == {
        "S3Uri": f"s3://{BUCKET}/checkpoints/{job['TrainingJobName']}",
        "LocalPath": "/opt/ml/checkpoints",
    }


def test_the_job_is_on_spot_instances(run):
    job = run.find("CreateTrainingJob")
    assert job["EnableManagedSpotTraining"] is True
    assert job["ResourceConfig"] == HARDWARE
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 14400, "MaxWaitTimeInSeconds": 28800}


def test_the_endpoint_serves_the_result_as_the_job_wrote(run):
    job, model = run.find("CreateTrainingJob"), run.find("CreateModel")
    container = model["PrimaryContainer"]
    assert re.fullmatch(rf"\d+\.dkr\.ecr\.{REGION}\.amazonaws\.com/djl-inference:[\w.-]+lmi[\w.-]+", container["Image"])
    assert container["Environment"] == {
        "OPTION_ENGINE": "Python",
        "OPTION_MODEL_ID": "/opt/ml/model",
        "OPTION_OVERRIDES": "a=b",
    }
    source = container["ModelDataSource"]["S3DataSource"]
    result = f"{job['OutputDataConfig']['S3OutputPath']}/{job['TrainingJobName']}/output/model/"
    assert source == {"S3Uri": result, "S3DataType": "S3Prefix", "CompressionType": "None"}
    assert set(run.aws.list_files(source["S3Uri"])) == {"serving.env", "model.safetensors"}
    assert model["ExecutionRoleArn"] == job["RoleArn"]
    (variant,) = run.find("CreateEndpointConfig")["ProductionVariants"]
    assert (variant["ModelName"], variant["InstanceType"]) == (model["ModelName"], "ml.g6.2xlarge")
    assert variant["InitialInstanceCount"] == 1
    config = run.find("CreateEndpointConfig")["EndpointConfigName"]
    assert run.find("CreateEndpoint")["EndpointConfigName"] == config


def test_the_endpoint_is_asked_in_chat_messages_and_its_answer_shown(run):
    assert run.find("InvokeEndpoint")["messages"][0]["role"] == "user"
    assert "Because they can." in run.read_output()


def test_everything_that_costs_money_is_deleted(run):
    sagemaker = run.aws.client("sagemaker")
    assert sagemaker.list_endpoints()["Endpoints"] == []
    assert sagemaker.list_endpoint_configs()["EndpointConfigs"] == []
    assert sagemaker.list_models()["Models"] == []


def validate(folder: Path, build: str, *options: Any) -> dict[str, Any]:
    """What llm-trainer validate finds out about the job below examples/, with a tiny model in the place of the Hub's.

    `build` is a program that writes the model to the folder FOLDER.
    """
    trainer, model = REPOSITORY / ".venv/bin/llm-trainer", folder / "tiny"
    paths = [str(REPOSITORY / "code"), str(REPOSITORY / "tests")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "SAGEMAKER_BASE_DIR": str(folder / "examples/job"),
    }
    program = f"import pathlib\nFOLDER = pathlib.Path({str(model)!r})\n{build}"
    subprocess.run([trainer.with_name("python"), "-c", program], env=variables, check=True)
    command = [trainer, "validate", "--json", "--model_id", model, *options]
    validation = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert validation.returncode == 0, validation.stdout + validation.stderr
    return json.loads(validation.stdout)


def test_the_trainer_takes_the_job(run):
    build = "from support import tiny_model\ntiny_model.build_tiny_model(FOLDER)"
    found = validate(run.folder, build, "--config", run.folder / "examples/job/args.yaml")
    assert found["data"]["train"]["num_rows"] == 15


BUILD_SEEING_MODEL = """
from support.tiny_processors import save_processor
from support.tiny_vision_models import build_vision_model
build_vision_model("qwen", save_processor("qwen", FOLDER)).save_pretrained(FOLDER)
"""


def read_variant() -> str:
    """The notebook's program up to its data, with images as the text before that cell tells it."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    place = next(number for number, cell in enumerate(cells) if "def to_messages" in cell.source and number)
    text, cell = cells[place].source, cells[place + 1].source
    function, line = re.search(r"```python\n(.*?)\n\n\n(\S.*?)\n```", text, re.DOTALL).groups()
    program = cell.replace(cell[cell.index("def ") : cell.index("rows = load")], f"{function}\n\n\n")
    program = program.replace(re.search(r"splits\[split\]\.to_json.*", program)[0], line)
    before = [each.source for each in cells[:place] if each.cell_type == "code"]
    return "\n".join([before[0], 'dataset_name, num_validation_rows = "cats", 2', *before[1:], program])


def test_the_variant_with_images_writes_rows_that_the_trainer_takes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason=MISSING)
    cat = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    )
    rows = [
        {"question": f"Cat {number}?", "answer": "Yes.", "image": {"bytes": cat, "path": None}} for number in range(6)
    ]
    (tmp_path / "examples/cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet("cats/rows.parquet")
    exec(read_variant(), {})
    report = validate(tmp_path, BUILD_SEEING_MODEL)["data"]["train"]
    assert (report["num_rows"], report["num_images"], report["num_bad_rows"]) == (4, 4, 0)


def test_the_result_comes_to_this_machine(run):
    job = run.find("CreateTrainingJob")["TrainingJobName"]
    assert (run.folder / f"examples/results/{job}/model/serving.env").read_text() == SERVING_ENV


def test_a_job_without_spot_leaves_a_warm_pool_and_needs_no_secret(tmp_path):
    with run_notebook(tmp_path, until='"--data-dir", str(channels))', use_spot=False) as run:
        job = run.find("CreateTrainingJob")
    assert not job.get("EnableManagedSpotTraining")
    assert job["ResourceConfig"] == {**HARDWARE, "KeepAlivePeriodInSeconds": 1800}
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 14400}
    assert job["Environment"].keys() == {"LLM_TRAINER_IMAGE"}
