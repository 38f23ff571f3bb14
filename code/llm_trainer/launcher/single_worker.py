# SPDX-License-Identifier: Apache-2.0
"""Start the worker of a job of one process, without torchrun: it imports torch for seconds to group one process."""

import subprocess
import sys
import time

from llm_trainer.common import log
from llm_trainer.common.processes import PYTHON, bind_command


def main() -> int:
    """Run the worker to its end. Return 0 or 1, and report a worker that died."""
    exit_code = subprocess.Popen(bind_command([*PYTHON, "-m", "llm_trainer.worker"])).wait()
    if exit_code:
        from llm_trainer.job.failure_reasons import report_death

        report_death(0, exit_code, time.time())
    return int(exit_code != 0)


if __name__ == "__main__":
    log.guard_output()
    sys.exit(main())
