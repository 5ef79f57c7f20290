"""The real server, asked by the official openai client: answers, tuning, versions."""

from served import labelled


def test_a_file_is_learnt_from_and_the_gate_promotes(server):
    number = server.upload("mail.csv", labelled())
    job = server.openai.fine_tuning.jobs.create(model="tiny", training_file=number, suffix="story")
    assert job.status == "queued"
    server.wait(lambda: server.job("story")["status"] == "succeeded", 120)
    found = server.job("story")
    print(found)
    print(server.openai.fine_tuning.jobs.list_events("story").data)
    assert found["last"]["score"] >= found["first"]["score"] + 0.1
    assert server.http.get("/v1/versions").json()["live"].startswith("story@")
