"""Plain text as a task: pieces of paragraphs, on the command line as on the server."""

from __future__ import annotations

import pytest

from zoray.models.folder import load_tokenizer
from zoray.models.tokens import Encoder
from zoray.records import ConfigError
from zoray.scoring.objectives import AnswerNLL
from zoray.tasks.file.task import File, open_rows

PARAGRAPHS = [f"Paragraph {i} of\nabout six words." for i in range(12)]


def rows(path):
    return [row for _, _, row in open_rows(str(path))["train"]]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "mac"])
def test_a_text_is_cut_into_pieces_of_which_a_third_is_given(tmp_path, suffix, end):
    path = tmp_path / f"notes{suffix}"
    text = "\ufeff\n" + "\n \t\n".join([*PARAGRAPHS, "Too short.", "w " * 250])
    path.write_bytes(text.replace("\n", end).encode())
    found = rows(path)
    assert found[0] == {"prompt": "Paragraph 0", "completion": " of about six words.\n\n"}
    assert [len((row["prompt"] + row["completion"]).split()) for row in found[12:]] == [120, 120, 10]
    source = open_rows(str(path))["train"]
    assert [source.where(place).rpartition(", ")[2] for place in (0, 1, 12, 14)] == [
        *("line 2", "line 5", "line 40", "line 40"),
    ]
    assert source.row(3) == found[3]


def test_it_is_a_task_of_completions_that_says_so(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join([*PARAGRAPHS, "# A title", "Too short, too."]))
    task = File(str(path), dev=2, test=2)
    splits = task.load()
    assert task.kind_found == "completion"
    assert [len(split) for split in (splits.train, splits.dev, splits.test)] == [8, 2, 2]
    every = {
        (example.prompt, *example.answers) for split in (splits.train, splits.dev, splits.test) for example in split
    }
    assert every == {(f"Paragraph {i}", " of about six words.\n\n") for i in range(12)}
    assert "12 rows, completion" in task.describe()[0]
    assert "left out, since they have fewer than 6 words: 2 paragraphs" in task.describe()


def test_several_texts_are_one(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{name} {paragraph}" for paragraph in PARAGRAPHS))
    found = rows(tmp_path / "*.txt")
    assert len(found) == 24 and found[0]["prompt"].startswith("a.txt") and found[23]["prompt"].startswith("b.txt")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"One paragraph of just enough words.", r"at least 10 paragraphs of 6 words or more in .*a\.txt; got 1\. Set"),
        (b"", "got 0"),
        (
            b"fine\n\ncaf\xe9",
            r"a\.txt, line 3: not UTF-8 \(byte 0xe9; .*\)\. Save the file as UTF-8",
        ),
    ],
    ids=["short", "empty", "latin-1"],
)
def test_a_text_that_is_none_is_refused(data, says, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        File(str(path)).load()


def test_what_follows_a_piece_is_what_follows_it_in_the_text(tmp_path, tiny_models):
    """A blank line, the end of the text, or where a long paragraph was cut, no end at all."""
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join([*PARAGRAPHS, "a " * 119 + "b " * 11, "It was the very last of them."]) + "\n\n \n")
    splits = File(str(path), dev=1, test=0).load()
    encoder, last = Encoder(load_tokenizer(tiny_models["llama"]), 256), set()
    for example in (*splits.train, *splits.dev):
        (sequence,) = AnswerNLL().encode(example, encoder)
        (forced,) = AnswerNLL(eos=True).encode(example, encoder)
        assert forced.targets[-1] == encoder.tokenizer.eos_token_id
        last.add(encoder.tokenizer.decode(sequence.targets)[-4:])
    assert last == {"s.\n\n", " a b", " b\n\n", "</s>"}
