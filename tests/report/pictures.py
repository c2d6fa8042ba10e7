"""The pictures in docs/reports.md, of runs of yours. Needs Chromium, and Pillow, which comes with matplotlib.

python -m tests.report.pictures FOLDER RUN [RUN ...]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import opened
from torchtitan_style.__main__ import main

# Width, height (0: the whole page) and whether it is dark.
PICTURES = {"report": (1200, 1150, False), "report_dark": (1200, 820, True), "report_phone": (400, 900, False)}


async def draw(page: Path, pictures: Path, profile: Path) -> None:
    async with opened(profile) as tab:
        for name, (width, height, dark) in PICTURES.items():
            await tab.load(page, width=width, dark=dark)
            await tab.screenshot(pictures / f"{name}.png", height=height)
            with Image.open(pictures / f"{name}.png") as picture:
                reduced = picture.convert("RGB").quantize(256)
            reduced.save(pictures / f"{name}.png", optimize=True)
            assert tab.complaints == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "report.html"
        main(["report", *sys.argv[2:], "--output", str(page)])
        asyncio.run(draw(page, Path(sys.argv[1]), Path(temporary) / "profile"))
