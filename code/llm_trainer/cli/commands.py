# SPDX-License-Identifier: Apache-2.0
"""The tree of commands: what each takes, and the function that runs it.

A command's own modules are imported only when it runs: those of all commands together take seconds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from llm_trainer import __version__

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
OWN_OPTIONS = {"train": HELP, "validate": HELP | {"--json"}, "plan": HELP | {"--json"}, "doctor": HELP}

Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def parse_command(words: Sequence[str]) -> argparse.Namespace:
    """Return what a command line asks for; `run` is the function that does it, `settings` the words about settings.

    Raises SystemExit after --help and --version, and with code 2 where the words are wrong.
    """
    name, rest = words[0], words[1:]
    parser = build_parser(lists_settings=name == "train" and not HELP.isdisjoint(rest))
    if name not in OWN_OPTIONS:
        return parser.parse_args(words)
    asked = parser.parse_args([name, *(word for word in rest if word in OWN_OPTIONS[name])])
    from llm_trainer.cli.folders import take_folders  # a parser of YAML comes with it
    from llm_trainer.common.errors import UserError

    try:
        asked.settings = take_folders([word for word in rest if word not in OWN_OPTIONS[name]])
    except UserError as error:
        parser.error(str(error))
    return asked


def build_parser(lists_settings: bool = False) -> argparse.ArgumentParser:
    """Return the parser of `llm-trainer`, with a subparser for each command.

    With `lists_settings`, the help of `train` has a paragraph for each setting, which takes longer to make.
    """
    parser = argparse.ArgumentParser("llm-trainer", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_train(commands, lists_settings)
    add_validate(commands)
    add_plan(commands)
    add_doctor(commands)
    add_merge(commands)
    add_metrics(commands)
    return parser


def list_commands() -> tuple[str, ...]:
    """Return the names of all commands."""
    return (*OWN_OPTIONS, "merge", "metrics")


def add_train(commands: "Commands[argparse.ArgumentParser]", lists_settings: bool) -> None:
    """Add the command that SageMaker starts."""
    parser = commands.add_parser(
        "train",
        usage="llm-trainer train [--SETTING VALUE ...]",
        help="fine-tune the model of the SageMaker tree on its data",
        description="Fine-tune the model of the SageMaker tree under /opt/ml (or SAGEMAKER_BASE_DIR) on its data.\n"
        + WHERE_SETTINGS_COME_FROM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if lists_settings:
        from llm_trainer.cli.settings_docs import format_settings

        parser.epilog = format_settings()
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
        usage="llm-trainer plan [--SETTING VALUE ...] [--json]",
        help="tell how its model would be loaded, and what that takes on a GPU",
        description="Tell how a job's model would be loaded and computed, and what that takes on a GPU. The model's "
        "config.json is enough: neither data nor weights nor a GPU are needed.",
        epilog=SEE_SETTINGS,
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.set_defaults(run=run_plan)


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
    parser.set_defaults(run=run_metrics)


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

    return run_on_first_process(asked.settings, lambda: plan(asked.settings, asked.json))


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

    return print_definitions(asked.json)
