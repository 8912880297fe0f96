"""Draws the pictures of the gallery: the first screen of the pages of runs, in light and dark.

    python docs/gallery_pages.py NAME=RUN [NAME=RUN ...]

Writes docs/images/gallery_NAME.png; needs playwright and a Chromium. Each has at most 150 kB.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from lightning_goldy.report import write_report

IMAGES = Path(__file__).parent / "images"
LARGEST = 150_000


def main(arguments: list[str]) -> None:
    """Draws each run's page; every other one is dark."""
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        for number, argument in enumerate(arguments):
            name, _, run = argument.partition("=")
            page_file = write_report(run, Path(folder) / f"{name}.html")
            scheme = "dark" if number % 2 else "light"
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            page.locator("#answers .answer").first.wait_for()
            target = IMAGES / f"gallery_{name}.png"
            target.write_bytes(reduced(page.screenshot()))
            print(target, target.stat().st_size)
        browser.close()


def reduced(png: bytes) -> bytes:
    """The picture with fewer colours, so that it is small."""
    for colours in (128, 64, 32):
        written = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").quantize(colours).save(written, "PNG", optimize=True)
        if written.tell() <= LARGEST:
            break
    return written.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
