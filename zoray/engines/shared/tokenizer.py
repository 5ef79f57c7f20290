"""The tokenizer of a server's requests: it reads them as training reads rows (control.py, tokens.py).

Messages in a chat are text, never control tokens of the template; no prompt ends in an end of text; no token is beyond
the model's embeddings.
"""

from __future__ import annotations

import threading
from typing import Any

from zoray.models.control import BREAK, Control
from zoray.models.tokens import PROBE, every_text, opening


def guard(tokenizer: Any, inner: Any, embeddings: int, name: str) -> None:
    """Change a tokenizer of vLLM's in place, so that all its holders get the change.

    Args:
        tokenizer: vLLM's; calls may come from several threads.
        inner: another tokenizer from the same folder, for texts that vLLM's does not get.
        embeddings: number of tokens that the model has embeddings for.
        name: the model's name in messages.
    """
    from transformers import BatchEncoding

    control, turn = Control(inner, embeddings, name), threading.Lock()

    class Guarded(tokenizer.__class__):
        def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
            render = super().apply_chat_template
            if options.get("tokenize", True):
                return render(conversation, *args, **options)

            def marked(chat: list[dict[str, Any]], **more: Any) -> str:
                def changed(change: Any) -> str:
                    said = [{key: every_text(value, at(key, change)) for key, value in one.items()} for one in chat]
                    return render(said, *args, **{**options, **more})

                texts: list[str] = []
                for message in chat:
                    every_text(message, lambda text: texts.append(text) or text)
                return control.rendered(changed, texts)

            before = marked(conversation)
            if not options.get("add_generation_prompt"):
                return before
            answered = [*conversation, {"role": "assistant", "content": PROBE}]
            return opening(before, inner.eos_token, lambda: marked(answered, add_generation_prompt=False))

        def encode(self, text: Any, *args: Any, **options: Any) -> Any:
            plain = isinstance(text, str) and not args
            return self(text, **options)["input_ids"] if plain else super().encode(text, *args, **options)

        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            if isinstance(text, list) and text and all(isinstance(one, str) for one in text):
                found = [self(one, *args, **options) for one in text]
                return BatchEncoding({key: [one[key] for one in found] for key in found[0]})
            special = options.get("add_special_tokens", True)
            if isinstance(text, str) and BREAK in text:
                with turn:
                    ids = control.ids(text, special)
                most = options.get("max_length") if options.get("truncation") else None
                ids = ids if most is None else ids[-most:] if self.truncation_side == "left" else ids[:most]
                return BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})
            found = super().__call__(text, *args, **options)
            if isinstance(text, str):
                if special and control.appended and found["input_ids"]:
                    found = BatchEncoding({key: values[: -control.appended] for key, values in found.items()})
                control.check(found["input_ids"])
            return found

    Guarded.__name__ = f"Guarded{tokenizer.__class__.__name__}"
    tokenizer.__class__ = Guarded


def at(key: str, change: Any) -> Any:
    """Apply `change` to a message's values, except a role, which is the API's own word."""
    return (lambda text: text) if key in ("role", "type") else change
