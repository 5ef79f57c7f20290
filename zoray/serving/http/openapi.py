"""Parts of the server's OpenAPI that FastAPI does not derive itself: errors, streams and uploads."""

from typing import Any

ERROR: dict[str, Any] = {
    "description": "An error in the form of OpenAI's API",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": "integer"},
                        },
                    }
                },
            }
        }
    },
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or a stream of its pieces", "content": {"text/event-stream": {}}}
}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file as it was uploaded", "content": {"application/octet-stream": {}}}
}
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                },
                "encoding": {"file": {"contentType": "text/csv"}},
            }
        },
    }
}
