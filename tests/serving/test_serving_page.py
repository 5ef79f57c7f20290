"""The page of a real server, in Chromium: what people see and do there, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from browsing import PATIENCE, chat, confirm, drop, fits, said, upload
from served import labelled

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

HOSTILE = '<img src=x onerror="document.title=1">'
HOLD = """() => {  // the first request of each kind waits in `held`: one that changes something before it is sent
  const real = fetch, kinds = new Set(["POST files", "GET overview", "POST preview"]);
  window.held = {};
  const wait = (kind) => kinds.delete(kind) ? new Promise((go) => { held[kind] = go; }) : null;
  window.fetch = async (path, options) => {
    const method = options.method || "GET", kind = `${method} ${path.split("?")[0].split("/").pop()}`;
    if (method !== "GET") await wait(kind);
    const response = await real(path, options);
    if (method === "GET" && held["POST files"]) await wait(kind);
    return response;
  };
}"""


def accuracies(page: Any) -> tuple[float, float]:
    """The first and the last accuracy on held-out rows, as the page tells them to a screen reader."""
    found = re.fullmatch(
        r"Accuracy .*: ([\d.]+) at step 0, ([\d.]+) at step \d+", page.get_attribute("#score", "aria-label")
    )
    assert found is not None
    return float(found[1]), float(found[2])


def test_a_file_is_learnt_from_promoted_answers_and_is_rolled_back(page):
    assert chat(page) == "tiny"
    page.click("#learning")
    said(page.locator("#state"), "active learning is off")
    drop(page, "mail.csv", labelled().decode())
    said(page.locator("#preview"), "mail.csv: 200 rows, choice")
    said(page.locator("#preview"), "training example 0, as the model reads it")
    page.click("#learn")
    said(page.locator("#job"), "waits until active learning is on, step 0 of 40")
    page.click("#learning")
    page.wait_for_selector("#job[data-status=running]")
    page.wait_for_selector("#job[data-status=succeeded]")
    assert int(page.get_attribute("#loss", "data-points")) == 40
    first, last = accuracies(page)
    assert last >= first + 0.1
    row = page.locator("#versions tr", has=page.locator(".badge", has_text="live"))
    version = row.locator("th").inner_text().split()[0]
    assert re.fullmatch(r"mail-\d{4}-\d{6}@\d+", version)
    said(row, "passed")
    said(page.locator("#model"), f"live (now {version})")
    assert chat(page) == version
    page.set_viewport_size({"width": 360, "height": 740})
    fits(page, 360)
    page.get_by_role("button", name="Roll back to tiny").click()
    said(page.locator("#alert-text"), "tiny answers as live from now on")
    assert chat(page) == "tiny"
    page.get_by_role("button", name=f"Roll back to {version}").click()
    said(page.locator("#alert-text"), f"{version} answers as live from now on")
    assert chat(page) == version
    page.fill("#step-name", f"{version.partition('@')[0]}@7")
    page.press("#step-name", "Enter")
    said(page.locator("#alert-text"), "@7 answers as live from now on")
    said(page.locator("#versions tr", has=page.locator(".badge", has_text="live")), "not judged")
    assert chat(page).endswith("@7")
    fits(page, 360)
    page.fill("#step-name", "7")
    page.click("#step-promote")
    said(page.locator("#alert-text"), "Expected a job and a step, such as mail@60; got 7")


def test_a_version_that_did_not_pass_is_promoted_only_after_a_question(page, server):
    number = server.upload("gate.csv", labelled())
    job = {"training_file": number, "suffix": "gated", "hyperparameters": {"steps": 20, "learning_rate": 1e-6}}
    server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    server.wait(lambda: server.job("gated")["status"] == "succeeded", 120)
    said(page.locator("#versions"), "not passed")
    page.get_by_role("button", name="Promote gated@20").click()
    said(page.locator("#sure-text"), "gated@20 did not pass the gate")
    page.keyboard.press("Escape")
    assert server.http.get("/v1/versions").json()["live"] is None
    page.get_by_role("button", name="Promote gated@20").click()
    confirm(page)
    said(page.locator("#alert-text"), "gated@20 answers as live")
    expect(page.get_by_role("button", name="Delete version gated@10")).to_have_count(0)
    page.get_by_role("button", name="Show 1 earlier version that did not pass").click()
    page.get_by_role("button", name="Delete version gated@10").click()
    confirm(page)
    expect(page.locator("#versions tr")).to_have_count(2, timeout=PATIENCE)
    page.click("#remove")
    confirm(page)
    said(page.locator("#job"), "Nothing has been learnt yet")
    expect(page.locator("#learning-title")).to_be_focused()


def test_active_learning_off_stops_a_job_after_its_step_and_on_lets_it_go_on(page, server):
    number = server.upload("toggle.csv", labelled())
    job = {"training_file": number, "suffix": "toggled", "hyperparameters": {"steps": 100_000}}
    server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    page.wait_for_selector("#job[data-status=running]")
    page.click("#learning")
    server.wait(lambda: server.job("toggled")["status"] == "queued")
    step = server.job("toggled")["step"]
    said(page.locator("#job"), f"waits until active learning is on, step {step} of 100000")
    page.wait_for_timeout(1500)
    assert server.job("toggled")["step"] == step
    page.click("#learning")
    server.wait(lambda: server.job("toggled")["step"] > step)
    said(page.locator("#state"), "Learning")
    page.click("#pause")
    page.wait_for_selector("#job[data-status=paused]")
    page.click("#resume")
    page.wait_for_selector("#job[data-status=running]")
    page.click("#cancel")
    confirm(page)
    page.wait_for_selector("#job[data-status=cancelled]")
    said(page.locator("#job"), "ended early")


def test_rated_answers_are_shown_kept_and_deleted(page, server):
    def kept() -> list[Any]:
        return server.http.get("/v1/conversations").json()["data"]

    for text in ("one", "two"):
        chat(page, text)
        page.get_by_role("button", name="Good answer").click()
        page.wait_for_selector(".rate[data-up=true][aria-pressed=true]")
    page.get_by_role("button", name="Bad answer").click()  # the second one after all
    page.wait_for_selector(".rate[data-up=false][aria-pressed=true]")
    expect(page.locator("#conversations > li")).to_have_count(2, timeout=PATIENCE)
    assert [one["up"] for one in kept()] == [True, False]
    page.locator("#conversations summary", has_text="two").click()
    said(page.locator("#conversations details[open] .said >> nth=0"), "two")
    page.wait_for_timeout(2500)  # a refresh, which must not close it, nor forget what was pressed
    expect(page.locator("#conversations details[open]")).to_have_count(1)
    page.get_by_role("button", name="Delete the conversation: two").click()
    expect(page.locator("#conversations > li")).to_have_count(1, timeout=PATIENCE)
    assert page.get_attribute(".rate[data-up=false]", "aria-pressed") == "false"
    assert page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent") != ""
    assert [one["messages"][0]["content"] for one in kept()] == ["one"]


def test_rated_answers_become_a_file_to_learn_from(page, server):
    for k in range(3):
        messages = [{"role": "user", "content": f"question {k}"}, {"role": "assistant", "content": f"the plot {k}"}]
        server.http.post("/v1/conversations", json={"messages": messages, "up": True}).raise_for_status()
    page.click("#to-file")
    said(page.locator("#use-title"), "How conversations-")
    said(page.locator("#preview"), "3 rows, chat")


def test_delete_everything_leaves_nothing_on_disk(page, server):
    upload(page, "forget.csv", labelled())
    page.wait_for_selector("#learn:enabled")
    chat(page)
    page.get_by_role("button", name="Good answer").click()
    page.click("#learn")
    page.wait_for_selector("#job[data-status=running]")
    page.click("#forget")
    confirm(page)
    said(page.locator("#stored"), re.compile("^Nothing\\."))
    assert not page.is_visible("#forget")
    assert not page.is_visible("#use")
    left = [path.name for path in server.folder.rglob("*") if path.is_file()]
    assert set(left) <= {".lock", ".server", "learning.json", "live.json"}
    assert chat(page) == "tiny"


def test_files_that_cannot_be_used_are_refused_in_plain_words(page, watched, server):
    drop(page, "setup.exe", "MZ")
    said(page.locator("#alert-text"), "setup.exe was not taken: expected a file of .csv, .tsv, .jsonl, .txt")
    page.click("#dismiss")
    expect(page.locator("#alert")).to_be_hidden()
    upload(page, "broken.csv", b"text,label\na,b\nc,d,e\n")
    said(page.locator("#wrong"), "broken.csv, line 3: expected 2 cells")
    assert page.is_disabled("#learn")
    upload(page, "other.csv", labelled().replace(b"text,label", b"body,kind", 1))
    said(page.locator("#wrong"), "the columns are 'body', 'kind'. Name yours, such as text_column=body label_column=")
    assert str(server.folder) not in page.inner_text("#wrong")
    page.fill("#columns", "text=body, label=kind")
    page.fill("#template", "{body} This is")
    page.press("#template", "Enter")
    said(page.locator("#preview"), "other.csv: 200 rows, choice")
    said(page.locator("#preview"), "This is» bad«")
    assert page.is_enabled("#learn")
    numbers = {file["filename"]: file["id"] for file in server.http.get("/v1/files").json()["data"]}
    previews = [f"/v1/files/{numbers[name]}/preview" for name in ("broken.csv", "other.csv")]
    watched.expected = [(400, "/v1/files"), *((400, path) for path in previews)]
    page.get_by_role("button", name="Delete broken.csv").click()
    confirm(page)
    expect(page.locator("#files > li")).to_have_count(1, timeout=PATIENCE)


def test_what_was_asked_for_before_an_upload_does_not_take_the_file_out_of_use(page):
    def held(what: str) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while not page.evaluate("what => Boolean(held[what])", what):  # the page's policy keeps wait_for_function out
            assert time.monotonic() < deadline, f"{what} was not asked for"
            page.wait_for_timeout(50)

    def free(what: str) -> None:
        held(what)
        page.evaluate("what => held[what]()", what)

    page.evaluate(HOLD)
    upload(page, "late.csv", labelled(24))
    held("POST files")
    page.set_checked("#learning", not page.is_checked("#learning"))  # asks for all there is, before the file is there
    held("GET overview")
    free("POST files")
    held("POST preview")
    free("GET overview")
    page.wait_for_timeout(1000)  # for what must not happen
    expect(page.locator("#use")).to_be_visible()
    free("POST preview")
    expect(page.locator("#learn")).to_be_enabled(timeout=PATIENCE)


def test_text_from_outside_is_never_markup(page, server):
    event = {"model": "tiny", "choices": [{"delta": {"content": HOSTILE}}]}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat(page, HOSTILE)
    said(page.locator("#turns li.mine"), HOSTILE)
    said(page.locator("#turns li:last-child"), HOSTILE)
    page.get_by_role("button", name="Good answer").click()
    said(page.locator("#conversations"), HOSTILE)
    upload(page, f"{HOSTILE}.csv", labelled().replace(b"a dull", HOSTILE.replace('"', "'").encode()))
    said(page.locator("#preview"), "200 rows")
    said(page.locator("#files"), "<img src=x onerror=")
    assert page.locator("img").count() == 0
    assert page.title() == "zoray"


def test_it_is_used_by_keyboard_alone_and_every_control_has_a_name(page, server):
    server.upload("keys.csv", labelled())
    said(page.locator("#files"), "keys.csv")
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.id || e.ariaLabel || e.textContent, s.outlineStyle, parseFloat(s.outlineWidth)]; }"
        )
        if found[0] in order or page.evaluate("document.activeElement === document.body"):
            break
        order.append(found[0])
        assert found[1] != "none" and found[2] >= 2, f"{found[0]} does not show that it has the focus"
    wanted = [
        "To the chat",
        "learning",
        "model",
        "question",
        "send",
        "clear",
        "file",
        "What a file should look like",
        "Use keys.csv",
        "Download keys.csv",
        "Delete keys.csv",
    ]
    assert order[: len(wanted)] == wanted
    assert "forget" in order
    page.focus(".skip")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("It was")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("good")
    page.keyboard.press("Enter")
    page.wait_for_selector(".rate >> nth=0")
    said(page.locator("#turns li.mine span"), "It was\ngood")
    said(page.locator("#said"), "tiny has answered")
    page.get_by_role("button", name="Use keys.csv").press("Enter")
    page.wait_for_selector("#learn:enabled")
    unnamed = re.findall(
        r"^\s*- (?:button|textbox|combobox|switch|link|checkbox|table|region|img|progressbar)(?![^\n]*\").*$",
        page.locator("body").aria_snapshot(),
        re.MULTILINE,
    )
    assert unnamed == []


def test_what_is_read_or_opened_stays_as_it_is_while_the_server_is_asked_again(page, server):
    upload(page, "first.csv", labelled())
    page.wait_for_selector("#learn:enabled")
    page.click("summary:has-text('What has been live')")
    page.focus("[aria-label='Delete first.csv']")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#preview'))")
    server.upload("second.csv", labelled())
    said(page.locator("#files"), "second.csv")
    expect(page.locator("[aria-label='Delete first.csv']")).to_be_focused()
    assert "first.csv: 200 rows" in page.evaluate("getSelection().toString()")
    assert page.locator("details[open]").count() == 1


CONTRASTS = """() => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const lit = (c) => [0, 1, 2].map((k) => linear(c[k] / 255))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const color = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = color(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const ratio = (a, b) => { const [x, y] = [lit(a), lit(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!e.checkVisibility() || e.disabled || !(own || e.matches("select, input[type=text], textarea"))) continue;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    found.push([ratio(color(ink), behind(e)), 4.5, e.id || e.className || e.tagName, e.textContent.slice(0, 30)]);
    if (e.matches("input[type=text], textarea, select")) {
      found.push([ratio(color(style.borderTopColor), behind(e.parentElement)), 3, e.id, "border"]);
    }
  }
  return found;
}"""


def test_on_a_phone_nothing_sticks_out_and_everything_can_be_read(page):
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.set_viewport_size({"width": 360, "height": 740})
    fits(page, 360)
    upload(page, f"a-rather-long-name-{'of-a-file-' * 6}.csv", labelled())
    page.wait_for_selector("#learn:enabled")
    chat(page, "a" * 60)
    page.get_by_role("button", name="Good answer").click()
    page.click("#learn")
    page.wait_for_selector("#job[data-status=succeeded]")
    fits(page, 360)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pairs = page.evaluate(CONTRASTS)
        assert len(pairs) > 40
        assert [pair for pair in pairs if pair[0] < pair[1]] == [], scheme


def test_the_key_is_asked_for_and_kept_for_the_tab(page, watched):
    def locked(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.fallback()
        else:
            error = {"error": {"message": "expected the server's key: Authorization: Bearer <key>"}}
            route.fulfill(status=401, json=error)

    page.route("**/v1/**", locked)
    expect(page.locator("#key-value")).to_be_focused(timeout=PATIENCE)
    expect(page.locator("#main")).to_be_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    said(page.locator("#key-wrong"), "does not take this key")
    page.fill("#key-value", "right")
    page.get_by_role("button", name="Use this key").click()
    said(page.locator("#state"), "Ready")
    expect(page.locator("#main")).to_be_visible()
    page.reload()
    said(page.locator("#state"), "Ready")
    assert chat(page) == "tiny"
    assert {status for status, _ in watched.refused} == {401}
    watched.expected = watched.refused
