"""Who is let in: by the server's own name, with a key that is known, and not while it guesses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moesaic.llms.gateway.keys import ANYBODY, Guesses, Key, Keys
from moesaic.llms.gateway.refusals import Refused, seconds

_PORT = re.compile(rb":\d+$")
LOOPBACK = frozenset([b"localhost", b"127.0.0.1", b"[::1]"])


class Gate:
    """Lets requests in.

    Args:
        hosts: names by which requests may call the server; empty for any. On loopback they are checked, as a page in a
            browser could have its own name lead here.
    """

    def __init__(self, keys: Keys, hosts: frozenset[bytes], guesses: Guesses) -> None:
        self.keys, self._hosts, self._guesses = keys, hosts, guesses

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise Refused where the request means another server."""
        name = _PORT.sub(b"", headers.get(b"host", b""))
        if self._hosts and name.lower() not in self._hosts:
            raise Refused(400, f"this server is not called {name[:80].decode('latin-1')!r}")

    def admit(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Key:
        """Whose key the request brings. Raises Refused for none or another, and for who guesses."""
        if not self.keys:
            return ANYBODY
        address = (scope.get("client") or ("",))[0]
        if wait := self._guesses.blocked(address):
            raise Refused(
                429, "too many wrong keys came from this address", "rate_limit_error", code="too_many_wrong_keys",
                headers=[seconds(wait)],
            )  # fmt: skip
        given = _bearer(headers)
        key = self.keys.find(given) if given else None
        if key is None:
            if given:
                self._guesses.wrong(address)
            raise Refused(
                401, "the API key is missing or another", "authentication_error", code="invalid_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )  # fmt: skip
        return key


def _bearer(headers: Mapping[bytes, bytes]) -> bytes:
    """The key of a request: its bearer token, or what Anthropic's clients send."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
