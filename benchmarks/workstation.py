"""The story of a server on a workstation, played in a browser: start, chat, upload, learn, promotion, chat, roll back.

    python -m benchmarks.workstation build/workstation
    python -m benchmarks.workstation build/workstation serve.steps=200 model.path=...  (settings of conf/serve.yaml)

The file is 2,000 movie reviews (task=movie_reviews) as CSV, of which 200 are held out and 200 are for test;
`--data` names another. Saves a screenshot of each step, story.json, and prints a table: step, what, seconds, accuracy
on held-out rows before and after. Needs playwright and a Chromium; the server is a real one, on a folder of its own
that is deleted at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.server import running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 2000
TEMPLATE = "{text} It was"
QUESTION = "A film with wonderful actors and a story that I will not forget. Was it terrible or great?"
MOST_SECONDS = 1800.0  # a step: a job of 400 takes half of it


class Story:
    """The steps, each with a screenshot and its time."""

    def __init__(self, page: Any, folder: Path) -> None:
        self._page, self._folder = page, folder
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str, what: str, show: str = "header") -> Iterator[dict[str, Any]]:
        """Time what is done within; then a screenshot, with the element `show` in sight."""
        row: dict[str, Any] = {"step": len(self.rows) + 1, "what": what, "seconds": 0.0, "before": None, "after": None}
        start = time.monotonic()
        yield row
        row["seconds"] = round(row["seconds"] + time.monotonic() - start, 1)
        self.rows.append(row)
        self._page.wait_for_timeout(2500)  # until the page has asked the server once more
        self._page.evaluate("id => document.querySelector(id).closest('section, header').scrollIntoView()", show)
        path = self._folder / f"serving-{row['step']}-{name}.png"
        self._page.screenshot(path=path)
        _shrink(path)
        print(f"{row['step']}. {what}: {row['seconds']} s", flush=True)


def play(page: Any, url: str, story: Story, data: Path, template: str, started: float) -> None:
    """The story on a server that answers at `url`."""
    from playwright.sync_api import expect

    patience = MOST_SECONDS * 1000
    page.set_default_timeout(patience)

    def chat() -> str:
        page.click("#clear")
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.wait_for_selector(".rate >> nth=0")
        return page.inner_text("#turns li:last-child small").split(",")[0]  # and perhaps: why it was cut

    with story.step("start", "started, the page is open") as row:
        row["seconds"] = started
        page.goto(url)
        expect(page.locator("#state")).to_contain_text("Ready", timeout=patience)
    with story.step("chat", "a chat with the base model"):
        base = chat()
    with story.step("upload", f"{data.name} uploaded, and how it will be used", "#data-title"):
        page.set_checked("#learning", False)  # to be switched on by hand below
        page.set_input_files("#file", str(data))
        page.wait_for_selector("#learn:enabled")
        page.fill("#template", template)
        page.press("#template", "Enter")
        expect(page.locator("#preview")).to_contain_text(template[-8:], timeout=patience)
        page.wait_for_selector("#learn:enabled")
    with story.step("learning", "active learning on, the first curve", "#learning-title"):
        page.click("#learn")
        expect(page.locator("#job")).to_contain_text("waits until active learning is on", timeout=patience)
        page.check("#learning")
        page.wait_for_selector("#score:is([data-points='2'], [data-points='3'], [data-points='4'])")
    with story.step("learnt", "the job has ended", "#learning-title") as row:
        page.wait_for_selector("#job[data-status=succeeded]")
        row["before"], row["after"] = _scores(page.get_attribute("#score", "aria-label"))
        page.click("summary:has-text('What has happened')")
        expect(page.locator("#events")).to_contain_text("on test rows", timeout=patience)
        row["outcome"] = page.locator("#events li", has_text="on test rows").inner_text()
    with story.step("promoted", "the gate has promoted a version", "#versions-title") as row:
        live = page.locator("#versions tr", has=page.locator(".badge", has_text="live"))
        version = live.locator("th").inner_text().split()[0]
        row["version"] = version
        if version == base:
            raise SystemExit("no version has passed the gate: see the screenshots")
        row["before"], row["after"] = map(float, live.locator("td strong").all_inner_texts())
    with story.step("chat-live", f"a new chat is answered by {version}") as row:
        row["answered_by"] = chat()
    with story.step("any-step", "a step between versions answers, made of the journal", "#versions-title") as row:
        row["version"] = f"{version.partition('@')[0]}@{int(version.partition('@')[2]) - 7}"
        page.fill("#step-name", row["version"])
        page.click("#step-promote")
        expect(page.locator("#alert-text")).to_contain_text(f"{row['version']} answers as live", timeout=patience)
    with story.step("rolled-back", "rolled back to the base model", "#versions-title"):
        page.get_by_role("button", name=f"Roll back to {base}").click()
        expect(page.locator("#alert-text")).to_contain_text(f"{base} answers as live", timeout=patience)
    with story.step("chat-base", f"a new chat is answered by {base}") as row:
        row["answered_by"] = chat()


def main() -> None:
    """Play the story and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the screenshots and story.json")
    parser.add_argument("settings", nargs="*", help="of the server, such as serve.steps=200")
    parser.add_argument("--data", type=Path, help="a labelled file; else movie reviews")
    parser.add_argument("--template", default=TEMPLATE, help="how the model is asked")
    parser.add_argument("--size", default="1280x800", help="of the window; 390x800 is a phone")
    parser.add_argument("--scheme", default="light", choices=["light", "dark"])
    asked = parser.parse_intermixed_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if chromium is None:
        raise SystemExit("expected chromium or google-chrome in PATH")
    asked.folder.mkdir(parents=True, exist_ok=True)
    width, height = map(int, asked.size.split("x"))
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        running([f"serve.folder={folder}/store", *asked.settings]) as url,
        sync_playwright() as playwright,
    ):
        started = time.monotonic() - began
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=asked.scheme)
        story = Story(page, asked.folder)
        try:
            play(page, url, story, asked.data or reviews(Path(folder)), asked.template, started)
        finally:
            browser.close()
            (asked.folder / "story.json").write_text(json.dumps(story.rows, indent=2) + "\n", encoding="utf-8")
    print(table(story.rows))


def reviews(folder: Path) -> Path:
    """Movie reviews as a labelled file, as somebody would have them in a spreadsheet."""
    from zoray.tasks.published.movie_reviews import published_file, read_ratings

    texts = dict((text, rating) for rating, text in read_ratings(published_file()) if abs(rating) >= 1)
    rows = random.Random(0).sample(sorted(texts), ROWS)
    path = folder / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((t, ("terrible", "great")[texts[t] > 0]) for t in rows)])
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """The steps as a table in Markdown."""
    lines = ["| step | what | seconds | accuracy before | after |", "|---|---|---|---|---|"]
    for row in rows:
        scores = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("before", "after")]
        lines.append(f"| {row['step']} | {row['what']} | {row['seconds']:.1f} | {' | '.join(scores)} |")
    return "\n".join(lines)


def _scores(label: str) -> tuple[float, float]:
    first, last = re.findall(r"([\d.]+) at step", label)
    return float(first), float(last)


def _shrink(path: Path) -> None:
    """A screenshot has few colours: a palette makes it a third of the size."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
