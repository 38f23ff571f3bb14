# SPDX-License-Identifier: Apache-2.0
"""`python -m llm_trainer`: the same as the command `llm-trainer`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder, from which `python -m` would import peft.py in the place of the library

from llm_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
