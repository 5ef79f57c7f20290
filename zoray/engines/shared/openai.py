"""vLLM's own OpenAI layer over a client: chat and text completions, streamed or whole, with its errors.

It answers everything that vLLM accepts, including vLLM's extensions (such as chat templates in a request): bodies must
have passed serving/http/chat_requests.py, which keeps OpenAI's fields and leaves out all others.
"""

from __future__ import annotations

from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    ErrorBody = Callable[[int, str, str | None], bytes]


class EngineGone(Exception):
    """vLLM's core has ended: the request has no answer, and can be repeated."""


class OpenAI:
    """The API's answers. `await OpenAI.open(client, error)`."""

    def __init__(self, client: Any, state: Any, error: ErrorBody) -> None:
        self.client, self._state, self._error = client, state, error

    @classmethod
    async def open(cls, client: Any, error: ErrorBody) -> OpenAI:
        """The layer over an AsyncLLM; the base model is called by its `served_model_name`.

        `error`: makes the body of an error response from (HTTP status, message, parameter at fault).
        """
        from starlette.datastructures import State
        from vllm.entrypoints.openai.api_server import init_app_state

        from zoray.engines.shared.tokenizer import guard
        from zoray.engines.vllm.compat import server_arguments
        from zoray.models.folder import load_tokenizer

        embeddings, name = client.model_config.get_vocab_size(), client.model_config.served_model_name
        tokenizer = client.get_tokenizer()
        tokenizer = await tokenizer if isawaitable(tokenizer) else tokenizer  # in older versions of vLLM
        guard(tokenizer, load_tokenizer(client.model_config.model), embeddings, name)
        arguments = server_arguments()
        arguments.model = client.model_config.model
        arguments.served_model_name = [client.model_config.served_model_name]
        state = State()
        await init_app_state(client, state, arguments, supported_tasks=("generate",))
        return cls(client, state, error)

    def let(self, name: str, slot: int | None) -> None:
        """From now on answer requests for `name` under the adapter in a slot of the engine; None: stop that."""
        from zoray.engines.shared.engine import slot_request

        known = self._state.openai_serving_models.lora_requests
        if slot is None:
            known.pop(name, None)
        else:
            known[name] = slot_request(name, slot)

    async def answer(
        self, kind: str, body: Mapping[str, Any], salt: str | None = None
    ) -> AsyncIterator[tuple[int, bool, bytes]]:
        """Yields (HTTP status, whether it is an event of a stream, data) for a request; several only for a stream.

        Args:
            kind: "chat" or "completions".
            body: the request, as JSON values within bounds (serving/http/chat_requests.py).
            salt: requests share prefixes only if their salts are equal: names of adapters may be reused.
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
        except Exception as error:  # vLLM's server has handlers for these; the caller may not have vLLM
            found = chat.create_error_response(error)
        if hasattr(found, "__aiter__"):
            async for event in found:
                yield 200, True, event.encode()
        elif (error := getattr(found, "error", None)) is not None:
            status = 400 if error.code == 501 else error.code  # the client asked for what this model can't do
            if self.client.errored:  # the core has died: another engine, or this one soon, can answer
                raise EngineGone(error.message)
            yield status, False, self._error(status, error.message, error.param)
        else:
            yield 200, False, found.model_dump_json().encode()


def _check_tokens(prompt: Any, embeddings: int) -> None:
    """Raise ConfigError if a prompt given as tokens has one without an embedding in the model."""
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
