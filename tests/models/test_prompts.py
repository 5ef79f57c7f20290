"""Prompts and what follows them as tokens: chats, ends, limits, stops."""

from __future__ import annotations

import numpy as np
import pytest
from chatty import TEMPLATE
from tiny import tiny_tokenizer

from zoray.models.tokens import Encoder
from zoray.records import ConfigError, Message

ASKED = (Message("system", "the best"), Message("user", "It was"))
SHOWN = "<s>system\nthe best</s>\n<s>user\nIt was</s>\n<s>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def test_a_chat_is_rendered_with_the_models_template(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.text(ASKED) == SHOWN and encoder.text("It was") == "It was"
    assert encoder.continuation(ASKED, " great ") == "great</s>"
    assert encoder.continuation("It was", " great ") == " great "
    tokens = encoder.tokens(ASKED)
    assert tokenizer.decode(tokens) == SHOWN and tokens.count(1) == 3  # <s>, and none that the tokenizer adds


def test_a_chat_needs_a_template():
    with pytest.raises(ConfigError, match="chat template for a task of messages; this one's tokenizer has none"):
        Encoder(tiny_tokenizer()).text(ASKED)


def test_a_template_that_renders_an_answer_otherwise_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}"
    with pytest.raises(ConfigError, match="does not begin an answer as it renders one"):
        Encoder(tokenizer).continuation(ASKED, "great")


def test_the_tokens_of_all_assistant_turns_are_found(tokenizer):
    """Those of the answers and their ends, and no others."""
    encoder = Encoder(tokenizer)
    chat = (
        *ASKED,
        Message("assistant", "great"),
        Message("user", "a dull story"),
        Message("assistant", "far too long"),
    )
    tokens, places = encoder.tokens_in(*encoder.assistant_spans(chat))
    assert tokenizer.decode(tokens) == f"{SHOWN}great</s>\n<s>user\na dull story</s>\n<s>assistant\nfar too long</s>\n"
    assert tokenizer.decode([tokens[i] for i in places]) == "great</s>far too long</s>"
    sequence = encoder.sequence(tokens, places)
    assert sequence.targets.tolist() == [tokens[i] for i in places]
    assert sequence.rows.tolist() == [i - 1 for i in places]
    assert sequence.tokens.tolist() == tokens[: places[-1]]


def test_an_answer_ends_as_asked(tokenizer):
    encoder = Encoder(tokenizer)
    ends = {
        (answer, eos): encoder.answer("It was", answer, eos).targets.tolist()[-1] == 2
        for answer in (" great", " great\n")
        for eos in (True, False, None)
    }
    assert [key for key, ended in ends.items() if ended] == [(" great", True), (" great", None), (" great\n", True)]


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_too_long_loses_its_beginning(bos):
    tokenizer = tiny_tokenizer(bos)
    long, limit = "the film is far too long " * 5, 12
    whole = tokenizer(long)["input_ids"]
    assert Encoder(tokenizer, limit).tokens(long) == whole  # refused elsewhere
    encoder = Encoder(tokenizer, limit, cut=True)
    for room in (0, 4):
        tokens = encoder.tokens(long, room)
        assert len(tokens) == limit - room and tokens[bos:] == whole[len(whole) - len(tokens) + bos :]
        assert (tokens[0] == 1) == bos
    assert encoder.shortened == 2 and encoder.tokens("It was") == tokenizer("It was")["input_ids"]
    exact = Encoder(tokenizer, len(whole), cut=True)
    assert exact.tokens(long) == whole and exact.shortened == 0  # what just fits has lost nothing
    sequence = encoder.answer(long, " great", False)
    assert len(sequence.tokens) == limit and sequence.rows.tolist() == [limit - 1]
    uncut = Encoder(tokenizer).answer(long, " great", False)
    assert sequence.targets.tolist() == uncut.targets.tolist()
    assert sequence.tokens.tolist()[bos:] == uncut.tokens.tolist()[len(uncut.tokens) - limit + bos :]
    lost = encoder.sequence(whole, range(1, len(whole)))  # targets whose tokens are gone are not asked for
    assert len(lost.rows) == limit and np.array_equal(lost.rows, np.arange(limit))


def test_stops_are_the_models_ends_and_tokens_with_a_stop_in_them(tokenizer):
    encoder = Encoder(tokenizer)
    newline = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    assert encoder.stop_ids(()) == {2} and encoder.stop_ids(("\n",)) == {2, *newline} and newline
    tokens = tokenizer("great\na dull story", add_special_tokens=False)["input_ids"]
    assert encoder.written(tokens, ("\n",)) == ("great", True)
    assert encoder.written(tokens, ("story", "dull")) == ("great\na ", True)
    assert encoder.written([*tokens, 2], ("wonderful",)) == ("great\na dull story", False)


def test_an_empty_prompt_begins_with_a_mark_where_it_may(tokenizer):
    shared, (tokens,) = Encoder(tokenizer).continued("", [" great"], start=True)
    assert (shared, tokens[0]) == (1, tokenizer.bos_token_id)
    with pytest.raises(ConfigError, match="prompt of at least one token"):
        Encoder(tokenizer).continued("", [" great"])
