"""What people can say on the page of a real server about their files, their jobs and the answers, in Chromium."""

from __future__ import annotations

import json
from typing import Any

import pytest
from browsing import PATIENCE, chat, confirm, drop, said, upload
from served import labelled

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect


def jobs(server) -> list[dict[str, Any]]:
    return server.http.get("/v1/fine_tuning/jobs").json()["data"]


def request_of(server, job: str) -> dict[str, Any]:
    return json.loads((server.folder / "jobs" / job / "request.json").read_text())


def test_a_new_user_sees_what_a_file_should_look_like_until_there_is_one(page):
    expect(page.locator("#forms")).to_have_attribute("open", "", timeout=PATIENCE)
    said(page.locator("#forms"), "text,label")
    upload(page, "first.csv", labelled())
    page.wait_for_selector("#learn:enabled")
    expect(page.locator("#forms")).not_to_have_attribute("open", "", timeout=PATIENCE)


def test_labels_that_are_numbers_and_columns_with_blanks_are_given_on_the_page(page, server, watched):
    data = labelled().replace(b"text,label", b"Email body,How good", 1).replace(b",good", b",1").replace(b",bad", b",0")
    upload(page, "numbers.csv", data)
    said(page.locator("#wrong"), "Email body")
    page.fill("#columns", "text=Email body, label=How good")
    page.fill("#words", "0=bad, 1=good")
    page.press("#words", "Enter")
    page.wait_for_selector("#learn:enabled")
    said(page.locator("#preview"), "numbers.csv: 200 rows, choice")
    page.check("#as-chat")
    page.wait_for_selector("#learn:enabled")
    said(page.locator("#preview"), "assistant")
    page.fill("#steps", "12")
    page.click("#learn")
    page.wait_for_selector("#job[data-status=succeeded]")
    said(page.locator("#job"), "finished, step 12 of 12")
    (job,) = jobs(server)
    use = {"text_column": "Email body", "label_column": "How good", "words": {"0": " bad", "1": " good"}, "chat": True}
    assert request_of(server, job["id"])["use"].items() >= use.items()
    number = server.http.get("/v1/files").json()["data"][0]["id"]
    watched.expected = [(400, f"/v1/files/{number}/preview")]


def test_nothing_is_learnt_that_the_preview_has_not_shown(page, server):
    upload(page, "mail.csv", labelled())
    page.wait_for_selector("#learn:enabled")
    page.fill("#template", "{text} This is")
    page.click("#learn")
    said(page.locator("#alert-text"), "The settings have changed since the preview")
    said(page.locator("#preview"), "This is")
    assert jobs(server) == []
    page.fill("#steps", "many")
    page.click("#learn")
    said(page.locator("#alert-text"), "Expected a whole number of steps; got many")
    page.fill("#words", "good")
    page.click("#look")
    said(page.locator("#wrong"), "Expected words such as 0=bad, 1=good; got good")
    assert jobs(server) == []


def test_of_several_files_one_that_is_refused_does_not_keep_the_others_out(page, watched):
    files = [("one.csv", labelled()), ("two.exe", b"MZ"), ("three.csv", labelled(40))]
    page.set_input_files("#file", [{"name": n, "mimeType": "text/plain", "buffer": data} for n, data in files])
    said(page.locator("#alert-text"), "two.exe was not taken: expected a file of .csv")
    expect(page.locator("#files > li")).to_have_count(2, timeout=PATIENCE)
    said(page.locator("#preview"), "three.csv: 40 rows")
    watched.expected = [(400, "/v1/files")]


def test_an_upload_can_be_had_back(page):
    drop(page, "mine.csv", labelled(40).decode())
    page.wait_for_selector("#learn:enabled")
    with page.expect_download() as found:
        page.get_by_role("button", name="Download mine.csv").click()
    assert found.value.suggested_filename == "mine.csv"
    with open(found.value.path(), "rb") as file:
        assert file.read() == labelled(40)


def test_another_answer_to_the_same_question_makes_a_pair_and_the_chat_goes_on_from_it(page, server):
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        event = {"model": "tiny", "choices": [{"delta": {"content": f"answer {len(asked)}"}}]}
        route.fulfill(body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    chat(page, "the plot")
    page.get_by_role("button", name="Bad answer").click()
    page.wait_for_selector(".rate[data-up=false][aria-pressed=true]")
    page.get_by_role("button", name="Another answer").click()
    page.click("#turns li:nth-child(3) .rate[data-up=true]")
    page.wait_for_selector(".rate[data-up=true][aria-pressed=true]")
    first, second = server.http.get("/v1/conversations").json()["data"]
    question, two = {"role": "user", "content": "the plot"}, {"role": "assistant", "content": "answer 2"}
    assert (first["up"], second["up"]) == (False, True)
    assert first["messages"] == [question, {"role": "assistant", "content": "answer 1"}]
    assert second["messages"] == [question, two]
    page.fill("#question", "and then?")
    page.press("#question", "Enter")
    page.wait_for_selector("#turns li:nth-child(5) .again")
    assert page.locator(".again").count() == 1  # only the last answer can have another
    assert [one["messages"] for one in asked] == [
        [question],
        [question],
        [question, two, {**question, "content": "and then?"}],
    ]
    assert asked[1]["temperature"] > asked[0]["temperature"]


def test_a_step_that_did_not_pass_is_asked_about_and_one_that_was_not_judged_is_not(page, server):
    number = server.upload("gate.csv", labelled())
    job = {"training_file": number, "suffix": "asked", "hyperparameters": {"steps": 20, "learning_rate": 1e-6}}
    server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    page.wait_for_selector("#job[data-status=succeeded]")
    page.fill("#step-name", "asked@20")
    page.press("#step-name", "Enter")
    said(page.locator("#sure-text"), "asked@20 did not pass the gate")
    page.keyboard.press("Escape")
    assert page.input_value("#step-name") == "asked@20"
    page.fill("#step-name", "asked@7")
    page.press("#step-name", "Enter")
    said(page.locator("#alert-text"), "asked@7 answers as live from now on.")
    page.fill("#step-name", "asked@20")
    page.click("#step-promote")
    confirm(page)
    said(page.locator("#alert-text"), "asked@20 answers as live")
    page.get_by_role("button", name="Roll back to asked@7").click()  # it has never stood before the gate
    said(page.locator("#alert-text"), "asked@7 answers as live")


def test_what_people_have_chosen_stands_while_the_job_goes_on(page, server):
    number = server.upload("held.csv", labelled())
    job = {"training_file": number, "suffix": "held", "hyperparameters": {"steps": 100_000}}
    server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    server.wait(lambda: server.http.get("/v1/versions").json()["live"], 120)
    page.get_by_role("button", name="Roll back to tiny").click()
    said(
        page.locator("#alert-text"),
        "The job at work promotes nothing by itself any more, until you pause and resume it",
    )
    step = server.job("held")["step"]
    server.wait(lambda: server.job("held")["step"] > step + 25, 120)
    assert server.http.get("/v1/versions").json()["live"] is None
    page.click("#cancel")
    confirm(page)
    page.wait_for_selector("#job[data-status=cancelled]")


def test_a_job_that_fails_says_so_wherever_one_looks(page, server):
    number = server.upload("torn.csv", labelled())
    job = {"training_file": number, "suffix": "torn", "hyperparameters": {"steps": 100_000}}
    server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    server.wait(lambda: server.job("torn")["step"] > 2)
    page.wait_for_selector("#job[data-status=running]")
    page.click("#pause")
    page.wait_for_selector("#job[data-status=paused]")
    server.wait(lambda: not server.job("torn")["working"])
    path = server.folder / "jobs" / "torn" / "run" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":9', 1))
    page.click("#resume")
    said(page.locator("#alert-text"), "torn has failed: JournalError")
    page.wait_for_selector("#job[data-status=failed]")


def test_the_job_at_work_is_shown_unless_another_has_been_picked(page, server):
    number = server.upload("two.csv", labelled())
    for name, steps in (("short", 5), ("endless", 100_000)):
        job = {"training_file": number, "suffix": name, "hyperparameters": {"steps": steps}}
        server.http.post("/v1/fine_tuning/jobs", json=job).raise_for_status()
    said(page.locator("#job"), "endless, from two.csv: learning")
    page.select_option("#jobs", "short")
    said(page.locator("#job"), "short, from two.csv: finished, step 5 of 5")
    page.wait_for_timeout(2500)  # a refresh
    said(page.locator("#job"), "short, from two.csv: finished")
    page.select_option("#jobs", "endless")
    page.click("#cancel")
    confirm(page)
    said(page.locator("#job"), "endless, from two.csv: ended early")
