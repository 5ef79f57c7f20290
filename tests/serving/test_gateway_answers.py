"""What clients of OpenAI's API ask of a model, to a server's HTTP side without engines: taken, or refused by name."""

from __future__ import annotations

import pytest
from gatewayed import error_of

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
USER, CALL = (
    {"role": "user", "content": "a"},
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
)
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]}]},
            "messages[1].content[1].type",
            "this server reads text parts only; got one of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
            "text parts only; got one of type 'input_audio'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "messages[0].content[0].type",
            "text parts only; got one of type 'file'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "should be a valid string",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "expected a text, or a list of text",
        ),
        (
            {"messages": [{"role": "user", "content": {"type": "text"}}]},
            "messages[0].content",
            "expected a text, or a list",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "expected at least 1 of them; got 0"),
        (
            {"messages": [{"role": "user", "content": "x" * 2_000_001}]},
            "messages[0].content",
            "at most 2000000 characters",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER]},
            "messages[1].tool_calls",
            "this server has no tools, and reads no calls to them. Leave the turn out",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": [CALL]}]},
            "messages[1].tool_calls",
            "no tools",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
            "messages[1].function_call",
            "no tools",
        ),
        (
            {"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": "5"}]},
            "messages[1].role",
            "this server has no tools, and reads no turn of role 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Field required"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": 5}, "stop", "expected a text, or a list of texts"),
        ({"stop": ["a"] * 5}, "stop", "expected at most 4 of them; got 5"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"tools": [CALL], "tool_choice": "required"}, "tool_choice", "no answer calls one, so expected none or auto"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            {"tools": [CALL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "response_format",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}},
            "tool_choice",
            "none",
        ),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call", "no tools"),
        (
            {"modalities": ["text", "audio"]},
            "modalities",
            'this server writes texts only: expected ["text"] or nothing',
        ),
        ({"audio": {"voice": "alloy"}}, "audio", "writes texts only"),
        ({"store": True}, "store", "this server keeps no answers"),
        ({"reasoning_effort": "high"}, "reasoning_effort", 'expected "none" or nothing'),
        ({"verbosity": "low"}, "verbosity", "say it in a message"),
        ({"web_search_options": {}}, "web_search_options", "searches nothing"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "one of max_completion_tokens and max_tokens"),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format.schema",
            "json_schema={name, schema}",
        ),
        ({"response_format": FORM}, "response_format.json_schema", "'#' refers to itself: a recursive schema"),
    ],
)
def test_the_error_is_the_one_that_was_made_in_openais_words(client, gateway, change, param, said):
    response = client.post("/v1/chat/completions", json={"messages": [USER], **change})
    error = error_of(response)
    assert response.status_code == 400 and error["param"] == param and said in error["message"], error
    assert param is None or error["message"].startswith(f"{param}: ")
    assert "constrained" not in error["message"] and "<" not in error["message"] and gateway.asked == []


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"prompt": ["a"] * 33}, "prompt", "expected at most 32 of them; got"),
        ({"prompt": [[1]] * 33}, "prompt", "expected at most 32 of them; got"),
        ({"prompt": 5}, "prompt", "expected a text, a list of texts, a list of token numbers, or a list of such lists"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "expected at least 1 of them"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "valid integer"),
        ({"prompt": [-1]}, "prompt[0]", "greater than"),
        ({"suffix": " end"}, "suffix", "nothing in between"),
    ],
)
def test_the_error_of_a_prompt_is_that_of_its_kind(client, gateway, change, param, said):
    error = error_of(client.post("/v1/completions", json={"prompt": "a", **change}))
    assert error["param"] == param and said in error["message"] and "<" not in error["message"], error


def test_fields_that_ask_for_nothing_pass(client, gateway):
    harmless = {
        "tools": [CALL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "reasoning_effort": "none",
        "modalities": ["text"],
        "prediction": {"type": "content"},
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "functions": [],
        "function_call": "none",
        "verbosity": "medium",
        "audio": None,
        "web_search_options": None,
        "max_tokens": 4,
        "max_completion_tokens": 4,
    }
    said = {
        "role": "assistant",
        "content": "b",
        "tool_calls": [],
        "function_call": None,
        "audio": None,
        "refusal": None,
    }
    assert client.post("/v1/chat/completions", json={"messages": [USER, said], **harmless}).status_code == 200
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CALL]}}
    assert client.post("/v1/chat/completions", json={"messages": [USER], "tool_choice": allowed}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": "a", "suffix": ""}).status_code == 200
    assert gateway.asked == [
        (
            "chat",
            {"messages": [USER, {"role": "assistant", "content": "b"}], "max_tokens": 4, "max_completion_tokens": 4},
        ),
        ("chat", {"messages": [USER]}),
        ("completions", {"prompt": "a"}),
    ]
