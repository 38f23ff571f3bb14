# SPDX-License-Identifier: Apache-2.0
"""The tree of commands: what each takes, and the function that runs it.

A command's own modules are imported only when it runs: those of all commands together take seconds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llm_trainer import __version__
from llm_trainer.common.metric_definitions import METHOD_METRICS

if TYPE_CHECKING:
    from llm_trainer.cli.plan_instances import PlanOptions

DESCRIPTION = "Fine-tune language models, in a SageMaker training job or on any machine that runs the image."
WHERE_SETTINGS_COME_FROM = """\
Settings come from the command line, from the job's hyperparameters, and from a YAML file
(channel `config`, or config=PATH). The command line wins, then hyperparameters, then the file.

--data-dir FOLDER holds a folder for each channel, such as train and model, in place of /opt/ml/input/data.
Without /opt/ml, --output-dir FOLDER gets what SageMaker keeps there: model, output and checkpoints."""
SEE_SETTINGS = "`llm-trainer train --help` lists all settings."
JSON_HELP = "print JSON, for a program to read"
HELP = frozenset({"-h", "--help"})
# The options of the commands that take settings. All their other words are settings, which have a syntax of their own
# (`job.parse_arguments`): a lone `--flag` means true, and dashes may stand for underscores.
STAND_INS = ("--rows", "--tokens-per-row", "--images-per-row")  # for data that are not there
OWN_OPTIONS = {
    "train": HELP,
    "validate": HELP | {"--json"},
    "plan": HELP | {"--json", "--prices", "--prices-file", "--region", "--learn", *STAND_INS},
    "doctor": HELP,
    "submit": HELP | {"--dry-run"},
}
# As many words as an option takes behind it. Others take none.
NUM_VALUES = {**dict.fromkeys(STAND_INS, 1), "--prices-file": 1, "--region": 1, "--learn": 1000}

# The commands about training jobs that were submitted, and what each does.
ON_AWS = {
    "watch": "show the log of a training job until it ends, then its result",
    "fetch": "bring what a training job has left, and unpack it",
    "stop": "end a training job in good order",
    "list": "list the newest training jobs, and all endpoints",
}
ON_ENDPOINTS = ("deploy", "invoke", "delete")

Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def parse_command(words: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for; `run` is the function that does it, `settings` the words about settings.

    Raises SystemExit after --help and --version, and with code 2 where the words are wrong.
    """
    name, rest = words[0], words[1:]
    parser = build_parser(helped=name if not HELP.isdisjoint(rest) else "", method=find_method(rest))
    if name not in OWN_OPTIONS:
        return parser.parse_args(words)
    own, others = split_options(rest, OWN_OPTIONS[name])
    asked = parser.parse_args([name, *own])
    from llm_trainer.cli.folders import take_folders  # a parser of YAML comes with it
    from llm_trainer.common.errors import UserError

    try:
        asked.settings = take_folders(others)
    except UserError as error:
        parser.error(str(error))
    return asked


def find_method(words: Sequence[str]) -> str:
    """Return the training method that the words about settings name, for the help on it; sft where they name none."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, separator, value = word.partition("=")
        if name == "--method":
            return value if separator else following
    return "sft"


def split_options(words: Sequence[str], options: frozenset[str]) -> tuple[list[str], list[str]]:
    """Return a command's own options with their values, and the words about settings."""
    own: list[str] = []
    others: list[str] = []
    num_values = 0
    for word in words:
        name, separator, _ = word.partition("=")
        is_own = name in options and (not separator or name in NUM_VALUES)
        if is_own:
            num_values = 0 if separator else NUM_VALUES.get(name, 0)
        elif word.startswith("--"):
            num_values = 0
        takes_value = not is_own and num_values > 0
        num_values -= takes_value
        (own if is_own or takes_value else others).append(word)
    return own, others


def build_parser(helped: str = "", method: str = "sft") -> argparse.ArgumentParser:
    """Return the parser of `llm-trainer`, with a subparser for each command.

    The help of the command `helped` has a paragraph for each setting of the method, or option, which takes longer to
    make.
    """
    parser = argparse.ArgumentParser("llm-trainer", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_train(commands, method if helped == "train" else None)
    add_validate(commands)
    add_plan(commands)
    add_doctor(commands)
    add_submit(commands, helped == "submit")
    add_merge(commands)
    add_metrics(commands)
    add_jobs(commands)
    add_endpoints(commands)
    return parser


def list_commands() -> tuple[str, ...]:
    """Return the names of all commands."""
    return (*OWN_OPTIONS, "merge", "metrics", *ON_AWS, *ON_ENDPOINTS)


def add_train(commands: "Commands[argparse.ArgumentParser]", listed_method: str | None) -> None:
    """Add the command that SageMaker starts. Its help lists the settings of this method."""
    parser = commands.add_parser(
        "train",
        usage="llm-trainer train [--SETTING VALUE ...]",
        help="fine-tune the model of the SageMaker tree on its data",
        description="Fine-tune the model of the SageMaker tree under /opt/ml (or SAGEMAKER_BASE_DIR) on its data.\n"
        + WHERE_SETTINGS_COME_FROM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if listed_method is not None:
        from llm_trainer.cli.settings_docs import format_settings
        from llm_trainer.config.trl_config_fields import CONFIG_CLASSES

        if listed_method not in CONFIG_CLASSES:
            parser.error(f"--method={listed_method} is none: take one of {', '.join(CONFIG_CLASSES)}.")
        parser.epilog = format_settings(listed_method)
    parser.set_defaults(run=run_train)


def add_validate(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the command that checks a job."""
    parser = commands.add_parser(
        "validate",
        usage="llm-trainer validate [--SETTING VALUE ...] [--json]",
        help="tell whether that job would start, and what it would train on",
        description="Tell, without a GPU or weights, whether a job would start, and what it would train on. "
        "All mistakes are told at once.",
        epilog=SEE_SETTINGS,
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.set_defaults(run=run_validate)


def add_plan(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the command that plans how a model is loaded."""
    parser = commands.add_parser(
        "plan",
        usage="llm-trainer plan [--SETTING VALUE ...] [--rows N --tokens-per-row N] [--prices] [--json]",
        help="tell which instances hold that job, how long it takes on them, and what it costs",
        description="Tell how a job's model would be loaded and computed, and what that takes in memory, hours and "
        "dollars on one to sixteen of every instance type of SageMaker. The model's config.json is enough: neither "
        "data nor weights nor a GPU are needed.",
        epilog=SEE_SETTINGS,
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    add_plan_arguments(parser)
    parser.set_defaults(run=run_plan)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what stands for data that are not there, where prices come from, and jobs to learn from."""
    rows = "rows of an epoch, with a pair as one, where the channel train is not there"
    tokens = "mean length of these rows without images; of a pair, of an answer with its prompt"
    images = "images of each row and their size, such as 1x1280x960; their tokens come on top"
    parser.add_argument("--rows", type=int, metavar="N", help=rows)
    parser.add_argument("--tokens-per-row", type=int, metavar="N", help=tokens)
    parser.add_argument("--images-per-row", metavar="NxWxH", help=images)
    parser.add_argument(
        "--prices", action="store_true", help="ask AWS's price list, and keep the answer in prices.json"
    )
    parser.add_argument("--prices-file", metavar="FILE", help="prices that were asked before, or where to keep them")
    parser.add_argument("--region", metavar="REGION", help="region of the job; default: AWS's settings")
    parser.add_argument(
        "--learn", nargs="+", metavar="MANIFEST", default=[], help="training_manifest.json of jobs, whose speed counts"
    )


def add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the command that checks a machine."""
    parser = commands.add_parser(
        "doctor",
        usage="llm-trainer doctor [--SETTING VALUE ...]",
        help="tell whether such a job would run well on this machine",
        description="Tell whether a job would run well on this machine: its devices, network and disks, the trackers "
        "of the job, and a sum over all devices.",
        epilog=SEE_SETTINGS,
    )
    parser.set_defaults(run=run_doctor)


def add_merge(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the command that merges an adapter into its base."""
    parser = commands.add_parser(
        "merge",
        help="add an adapter to its base model, outside a job",
        description="Add an adapter to its base model, from disk to disk, and write the tokenizer's files beside it. "
        "A merge that was cut off goes on where it ended.",
        allow_abbrev=False,
    )
    add_merge_arguments(parser)
    parser.set_defaults(run=run_merge)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders of a merge, and how it is done."""
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="folder of the adapter")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="an empty or new folder, or one that a cut-off merge left"
    )
    parser.add_argument(
        "--base", metavar="FOLDER_OR_HUB_ID", help="the base model; default: the one that the adapter names"
    )
    parser.add_argument(
        "--merge_base",
        choices=["bf16", "dequantized"],
        default="bf16",
        help="merge into the original weights (bf16, the default), or into what quantization made of them",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="type of the merged weights; auto, the default: as the base is stored",
    )
    parser.add_argument("--model_revision", metavar="REVISION", help="branch, tag or commit of a base from the Hub")
    parser.add_argument(
        "--trust_remote_code",
        choices=["true", "false"],
        default="false",
        help="run the code that comes with the base; default: false",
    )


def add_metrics(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the command that prints metric definitions."""
    parser = commands.add_parser(
        "metrics",
        help="print the metric definitions with which SageMaker reads the log",
        description="Print each metric of the log, its meaning, and the regular expression with which SageMaker reads "
        "it (AlgorithmSpecification's MetricDefinitions).",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the list that CreateTrainingJob takes")
    parser.add_argument(
        "--method", default="sft", choices=("sft", *METHOD_METRICS), help="training method; default: sft"
    )
    parser.add_argument(
        "--reward", action="append", default=[], metavar="NAME", help="a reward of the job; may be given several times"
    )
    parser.set_defaults(run=run_metrics)


def add_submit(commands: "Commands[argparse.ArgumentParser]", lists_options: bool) -> None:
    """Add the command that starts a job on SageMaker."""
    parser = commands.add_parser(
        "submit",
        usage="llm-trainer submit [FILE.yaml] [--OPTION VALUE ...] [--SETTING VALUE ...] [--max-dollars N] [--dry-run]",
        help="start the job on SageMaker, after checking it",
        description="Start a training job on SageMaker. FILE.yaml holds settings, and under `job:` the options below.\n"
        "The command line wins over both.\n\n--data-dir FOLDER holds a folder for each channel to upload.\n"
        "--max-dollars N refuses a job that `plan` finds dearer, by the prices of --prices or --prices-file FILE.\n"
        "It also lowers the job's limit of time to what N pays for.\n"
        "--rows N, --tokens-per-row N and --images-per-row NxWxH tell `plan` of data that are in S3.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if lists_options:
        from llm_trainer.cli.settings_docs import format_option_list

        parser.epilog = f"{format_option_list()}\n\n{SEE_SETTINGS}"
    parser.add_argument(
        "--dry-run", action="store_true", help="print the request of CreateTrainingJob, and start nothing"
    )
    parser.set_defaults(run=run_submit)


def add_jobs(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the commands that take the name of a training job, and the list of them."""
    for name, help_text in ON_AWS.items():
        parser = commands.add_parser(name, help=help_text, description=f"{help_text.capitalize()}.", allow_abbrev=False)
        parser.set_defaults(run=run_on_aws, command=name)
        if name != "list":
            parser.add_argument("name", metavar="JOB", help="name of the training job")
        if name == "fetch":
            parser.add_argument(
                "--output", metavar="FOLDER", help="where to put it; default: a folder of the job's name"
            )


def add_endpoints(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add the commands that make an endpoint of a job's result, ask it, and delete it."""
    text = "serve what a training job has left on an endpoint"
    parser = commands.add_parser("deploy", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    parser.add_argument("job", metavar="JOB", help="name of the training job")
    parser.add_argument("--instance_type", required=True, metavar="TYPE", help="such as ml.g6.2xlarge")
    parser.add_argument("--instance_count", type=int, default=1, metavar="N", help="number of instances; default: 1")
    parser.add_argument("--name", metavar="NAME", help="name of the endpoint; default: the job's")
    parser.add_argument("--role", metavar="ROLE", help="name or ARN of its role; default: the job's")
    parser.add_argument("--image", metavar="IMAGE", help="default: AWS's LMI image of the region")
    parser.add_argument("--model_id", metavar="S3_PREFIX", help="base of an adapter whose base came as a channel")
    parser.set_defaults(run=run_deploy)
    text = "ask an endpoint, and print its answer"
    parser = commands.add_parser("invoke", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    parser.add_argument("name", metavar="ENDPOINT", help="name of the endpoint")
    parser.add_argument("question", metavar="QUESTION", help="the user's words")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image before the question; several"
    )
    parser.add_argument("--max_tokens", type=int, default=512, metavar="N", help="longest answer; default: 512 tokens")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.set_defaults(run=run_invoke)
    text = "delete an endpoint, with its configuration and its model's name"
    parser = commands.add_parser("delete", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    parser.add_argument("name", metavar="ENDPOINT", help="name of the endpoint")
    parser.set_defaults(run=run_delete)


def run_train(asked: argparse.Namespace) -> int:
    """Run a job, and return the container's exit code."""
    from llm_trainer.launcher.last_words import run_to_an_answer

    def run() -> int:
        from llm_trainer.launcher.launch import launch  # an import that fails is told of, too

        return launch(asked.settings)

    return run_to_an_answer(run)


def run_on_first_process(settings: Sequence[str], command: Callable[[], int]) -> int:
    """Run a command in one process of this node, where a launcher has started several, and return its exit code."""
    from llm_trainer.common.errors import UserError
    from llm_trainer.config.environment import find_placement
    from llm_trainer.launcher.stand_by import run_once_a_node

    try:
        find_placement()
    except UserError:  # the command tells this among other mistakes
        return command()
    try:
        return run_once_a_node(settings, lambda _: command())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def run_validate(asked: argparse.Namespace) -> int:
    """Check a job, and return the exit code."""
    from llm_trainer.cli.validate import validate

    return run_on_first_process(asked.settings, lambda: validate(asked.settings, asked.json))


def run_plan(asked: argparse.Namespace) -> int:
    """Plan how a model is loaded, and return the exit code."""
    from llm_trainer.cli.plan import plan

    options = read_plan_options(asked)
    return run_on_first_process(asked.settings, lambda: plan(asked.settings, asked.json, options))


def read_plan_options(asked: argparse.Namespace) -> "PlanOptions":
    """Return the options of `plan` that are no settings."""
    from llm_trainer.cli.plan_instances import PlanOptions

    return PlanOptions(
        rows=asked.rows,
        tokens_per_row=asked.tokens_per_row,
        images_per_row=asked.images_per_row,
        asks_prices=asked.prices,
        prices_file=asked.prices_file,
        region=asked.region,
        learn_from=asked.learn,
    )


def run_submit(asked: argparse.Namespace) -> int:
    """Start a training job on SageMaker, and return the exit code."""
    from llm_trainer.cli.sagemaker.submit import submit

    return submit(asked.settings, asked.dry_run)


def run_on_aws(asked: argparse.Namespace) -> int:
    """Run a command about a training job, and return the exit code."""
    from llm_trainer.cli.sagemaker import jobs

    if asked.command == "list":
        return jobs.list_all()
    if asked.command == "fetch":
        return jobs.fetch(asked.name, asked.output)
    return jobs.watch(asked.name) if asked.command == "watch" else jobs.stop(asked.name)


def run_deploy(asked: argparse.Namespace) -> int:
    """Serve a job's result, and return the exit code."""
    from llm_trainer.cli.sagemaker.endpoints import DeployOptions, deploy

    names = ("job", "instance_type", "instance_count", "name", "image", "role", "model_id")
    return deploy(DeployOptions(**{name: getattr(asked, name) for name in names}))


def run_invoke(asked: argparse.Namespace) -> int:
    """Ask an endpoint, and return the exit code."""
    from llm_trainer.cli.sagemaker.endpoints import InvokeOptions, invoke

    names = ("name", "question", "max_tokens", "json", "image")
    return invoke(InvokeOptions(**{name: getattr(asked, name) for name in names}))


def run_delete(asked: argparse.Namespace) -> int:
    """Delete an endpoint, and return the exit code."""
    from llm_trainer.cli.sagemaker.endpoints import delete

    return delete(asked.name)


def run_doctor(asked: argparse.Namespace) -> int:
    """Check this machine, and return the exit code."""
    from llm_trainer.cli.doctor import diagnose

    return run_on_first_process(asked.settings, lambda: diagnose(asked.settings))


def run_merge(asked: argparse.Namespace) -> int:
    """Merge an adapter into its base, and return the exit code."""
    from llm_trainer.cli.merge import MergeOptions, merge_adapter

    return merge_adapter(
        MergeOptions(
            adapter=asked.adapter,
            output=asked.output,
            base=asked.base,
            merge_base=asked.merge_base,
            dtype=asked.dtype,
            model_revision=asked.model_revision,
            trust_remote_code=asked.trust_remote_code == "true",
        )
    )


def run_metrics(asked: argparse.Namespace) -> int:
    """Print the metric definitions, and return the exit code."""
    from llm_trainer.cli.metrics import print_definitions

    return print_definitions(asked.method, asked.reward, asked.json)
