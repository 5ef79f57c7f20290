"""vLLM's own OpenAI layer over a client: chat and text completions, streamed or whole, with its errors.

It answers whatever vLLM can be asked, its own extensions too (chat templates in a request, and others): bodies have to
have passed serving/http/chat_requests.py, which knows OpenAI's fields and leaves all others out.
"""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    ErrorBody = Callable[[int, str, str | None], bytes]


class EngineGone(Exception):
    """vLLM's core has ended: the request has no answer, and can be asked again."""


class OpenAI:
    """The API's answers. `await OpenAI.open(client, error)`."""

    def __init__(self, client: Any, state: Any, error: ErrorBody) -> None:
        self.client, self._state, self._error = client, state, error

    @classmethod
    async def open(cls, client: Any, error: ErrorBody) -> OpenAI:
        """The layer over an AsyncLLM, whose base model is called as its `served_model_name`.

        `error`: what an error looks like to those who asked, from (HTTP status, message, parameter at fault).
        """
        from starlette.datastructures import State
        from vllm.entrypoints.openai.api_server import init_app_state

        from zoray.engines.shared.tokenizer import guard
        from zoray.engines.vllm.compat import server_arguments
        from zoray.models.folder import load_tokenizer

        embeddings, name = client.model_config.get_vocab_size(), client.model_config.served_model_name
        tokenizer = client.get_tokenizer()
        tokenizer = await tokenizer if isawaitable(tokenizer) else tokenizer  # in older versions
        guard(tokenizer, load_tokenizer(client.model_config.model), embeddings, name)
        arguments = server_arguments()
        arguments.model = client.model_config.model
        arguments.served_model_name = [client.model_config.served_model_name]
        state = State()
        await init_app_state(client, state, arguments, supported_tasks=("generate",))
        return cls(client, state, error)

    def let(self, name: str, slot: int | None) -> None:
        """Answer requests for `name` under what a slot of the engine's holds from now on; None: no longer."""
        from zoray.engines.shared.engine import slot_request

        known = self._state.openai_serving_models.lora_requests
        if slot is None:
            known.pop(name, None)
        else:
            known[name] = slot_request(name, slot)

    async def answer(
        self, kind: str, body: Mapping[str, Any], salt: str | None = None
    ) -> AsyncIterator[tuple[int, bool, bytes]]:
        """(HTTP status, whether it is a stream of events, data) of a request; several only where it is a stream.

        Args:
            kind: "chat" or "completions".
            body: the request, as JSON values within bounds (serving/http/chat_requests.py).
            salt: prefixes are shared only among requests with the same one: names of adapters may come again.
        """
        from pydantic import ValidationError

        chat, text = self._state.openai_serving_chat, self._state.openai_serving_completion
        try:
            _check_tokens(body.get("prompt"), self.client.model_config.get_vocab_size())
            request = _request(kind, body, salt)
            found = await (chat.create_chat_completion if kind == "chat" else text.create_completion)(request)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            yield 400, False, self._error(400, f"{where}: {first['msg']}" if where else first["msg"], where or None)
            return
        except Exception as error:  # vLLM's own server has handlers around it; who asks may not have vLLM
            found = chat.create_error_response(error)
        if hasattr(found, "__aiter__"):
            async for event in found:
                yield 200, True, event.encode()
        elif (error := getattr(found, "error", None)) is not None:
            status = 400 if error.code == 501 else error.code  # what this model can't do was asked for wrongly
            if self.client.errored:  # its core has died: another engine, or this one soon, can answer
                raise EngineGone(error.message)
            yield status, False, self._error(status, error.message, error.param)
        else:
            yield 200, False, found.model_dump_json().encode()


def _check_tokens(prompt: Any, embeddings: int) -> None:
    """Raise ConfigError if a prompt that is given as tokens has one that the model has no embedding for."""
    for part in prompt if isinstance(prompt, list) else ():
        for token in part if isinstance(part, list) else [part]:
            if isinstance(token, int) and token >= embeddings:
                raise ConfigError(f"expected tokens below {embeddings}, the model's embeddings; got {token}")


def _request(kind: str, body: Mapping[str, Any], salt: str | None) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    request = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**body)
    request.cache_salt = salt
    return request
