# SPDX-License-Identifier: Apache-2.0
"""The command line: `llm-trainer train`, which is what SageMaker starts, and the commands around it."""

import sys

from llm_trainer import __version__

USAGE = """usage: llm-trainer train [--SETTING VALUE ...]
       llm-trainer train --help
       llm-trainer validate [--SETTING VALUE ...] [--json]
       llm-trainer doctor [--SETTING VALUE ...]
       llm-trainer metrics [--json]
       llm-trainer --version

train fine-tunes the model and data of the SageMaker tree under /opt/ml (or SAGEMAKER_BASE_DIR).
validate tells, without GPU or weights, whether that job would start, and what it would train on.
doctor tells whether such a job would run well on this machine.
metrics prints the metric definitions with which SageMaker reads the log.
"""


def main() -> int:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    wants_help = "--help" in arguments or "-h" in arguments
    if command == "--version":
        print(__version__)
        return 0
    if command == "train" and wants_help:
        from llm_trainer.settings_table import as_help

        print(as_help())
        return 0
    if command == "train":
        from llm_trainer.launch import launch

        return launch(arguments)
    if command == "validate" and not wants_help:
        from llm_trainer.validate import validate

        return validate(arguments)
    if command == "doctor" and not wants_help:
        from llm_trainer.doctor import diagnose

        return diagnose(arguments)
    if command == "metrics" and not wants_help:
        from llm_trainer.metric_definitions import print_definitions

        return print_definitions(arguments)
    is_asked = command in ("validate", "doctor", "metrics", "--help", "-h")
    print(USAGE, end="", file=sys.stdout if is_asked else sys.stderr)
    return 0 if is_asked else 2


if __name__ == "__main__":
    sys.exit(main())
