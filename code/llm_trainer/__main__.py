# SPDX-License-Identifier: Apache-2.0
"""The command line: `llm-trainer train`, which is what SageMaker starts."""

import sys

from llm_trainer import __version__

USAGE = """usage: llm-trainer train [--SETTING VALUE ...]
       llm-trainer train --help
       llm-trainer --version

Fine-tunes the model and data of the SageMaker tree under /opt/ml (or SAGEMAKER_BASE_DIR).
"""


def main() -> int:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "--version":
        print(__version__)
        return 0
    if command == "train" and ("--help" in arguments or "-h" in arguments):
        from llm_trainer.settings_table import as_help

        print(as_help())
        return 0
    if command == "train":
        from llm_trainer.launch import launch

        return launch(arguments)
    print(USAGE, end="", file=sys.stdout if command in ("--help", "-h") else sys.stderr)
    return 0 if command in ("--help", "-h") else 2


if __name__ == "__main__":
    sys.exit(main())
