"""Opens a report in the system's Chromium, which playwright drives; it downloads no browser of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


def check_in_browser(path: Path, curves: int) -> None:
    """The page shows curves and plays its video, says nothing on the console, and asks no network; dark, wide and on a phone."""
    from playwright.sync_api import sync_playwright

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme="dark")
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        # plays by itself: the time goes on
        page.wait_for_function("document.querySelector('video').currentTime > 0.1", timeout=20_000)
        video = page.evaluate(
            "(({videoWidth, paused, muted}) => ({videoWidth, paused, muted}))(document.querySelector('video'))"
        )
        assert video["videoWidth"] > 0 and not video["paused"] and video["muted"]
        drawn = page.evaluate(
            """[...document.querySelectorAll('#curves svg')].map(svg => {
                const {width, height} = svg.getBoundingClientRect()
                const lines = [...svg.querySelectorAll('g[id^=line2d] > path')].map(line => line.getBBox())
                return {width, height, lines: lines.filter(box => box.width > 50).length,
                        ink: getComputedStyle(svg.querySelector('text')).fill}
            })"""
        )
        assert len(drawn) >= curves
        ink = page.evaluate("getComputedStyle(document.body).color")
        for svg in drawn:
            assert svg["width"] > 200 and svg["height"] > 100 and svg["lines"] >= 1 and svg["ink"] == ink
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
        browser.close()
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
