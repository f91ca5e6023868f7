"""What a gateway answers where it does not answer: OpenAI's error form, one line each."""

from __future__ import annotations

import json
from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]
INVALID, SERVER = "invalid_request_error", "server_error"


class Refused(Exception):
    """An answer that is an error.

    Args:
        kind: OpenAI's `type`. code, param: OpenAI's. headers: beside Content-Type and Content-Length.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param, self.headers = status, kind, code, param, tuple(headers)

    def content(self) -> dict[str, dict[str, str | None]]:
        message = " ".join(str(self).encode("utf-8", "replace").decode().split())[:500]
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        return json.dumps(self.content(), ensure_ascii=False).encode()


def seconds(wait: float) -> tuple[bytes, bytes]:
    """Retry-After: whole seconds, at least one."""
    return b"retry-after", b"%d" % max(1, -int(-wait // 1))
