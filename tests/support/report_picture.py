# SPDX-License-Identifier: Apache-2.0
"""A picture of a report for the README: `python tests/support/report_picture.py REPORT PICTURE`."""

import base64
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.chromium import EXECUTABLE, Page

WIDTH = 1280  # pixels
HEIGHT = 1150  # pixels: the outcome, the advice and the first charts


def take_picture(report: Path, picture: Path) -> None:
    """Write the top of a report's page as a PNG image."""
    page = Page()
    try:
        page.open(report.absolute(), width=WIDTH)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        image = page.call("Page.captureScreenshot", captureBeyondViewport=True, format="png", clip=clip)
    finally:
        page.close()
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(image["data"]))


if __name__ == "__main__":
    if EXECUTABLE is None:
        sys.exit("There is no Chromium here: `apt-get install chromium` gives one.")
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
