# SPDX-License-Identifier: Apache-2.0
"""A picture of a report for the README: `python tests/support/report_picture.py REPORT PICTURE`."""

import base64
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.chromium import EXECUTABLE, Page

WIDTH = 1100  # pixels
NUM_CHARTS = 3  # the picture ends below so many
# Shows the job's tree where a container has it, and no path of the machine that ran the job.
SHOW_AS_OPT_ML = """(tree) => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) walker.currentNode.data = walker.currentNode.data.replaceAll(tree, '/opt/ml');
}"""
FIND_BOTTOM = f"document.querySelectorAll('figure')[{NUM_CHARTS - 1}].getBoundingClientRect().bottom + 8"


def take_picture(report: Path, picture: Path) -> None:
    """Write the top of the report of a job's tree, from its outcome to the first charts, as a PNG image."""
    report = report.absolute()
    page = Page()
    try:
        page.open(report, width=WIDTH)
        page.run(f"({SHOW_AS_OPT_ML})({json.dumps(str(report.parents[2]))})")
        page.settle()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": page.run(FIND_BOTTOM), "scale": 1}
        image = page.call("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)
    finally:
        page.close()
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(image["data"]))


if __name__ == "__main__":
    if EXECUTABLE is None:
        sys.exit("There is no Chromium here: `apt-get install chromium` gives one.")
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
