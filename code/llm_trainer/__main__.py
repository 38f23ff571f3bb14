# SPDX-License-Identifier: Apache-2.0
"""`python -m llm_trainer`: the same as the command `llm-trainer`."""

import sys

from llm_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
