"""The server's limits, each with its default."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import DualCodecError

_COUNTS = {"port": (0, 65535), "streams": (1, 1024), "message_bytes": (16, 1 << 30)}
_SECONDS = ("ahead_s", "hello_s", "idle_s", "stall_s", "grace_s")


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and what it allows.

    Args:
        host: address; the default is reached from this machine alone.
        port: 0 takes a free one.
        streams: at a time; further ones are refused.
        message_bytes: the longest message that a client may send.
        ahead_s: seconds of audio that a stream may have in its queue, in and out; a client that sends faster waits.
        hello_s: for a client's first message.
        idle_s: from one message to the next.
        stall_s: for a client to read anything while there is something to read.
        grace_s: at the end, for what was taken in to leave.
        lookahead: frames that decoded audio may run behind; None: as many as the model needs.
        origins: pages of other sites that may open streams, such as https://example.org.

    Raises:
        DualCodecError: a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    streams: int = 32
    message_bytes: int = 1 << 20
    ahead_s: float = 10.0
    hello_s: float = 10.0
    idle_s: float = 60.0
    stall_s: float = 10.0
    grace_s: float = 5.0
    lookahead: int | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise DualCodecError(f"serve: {name} must be a whole number from {least} to {most}, got {value!r}")
        for name in _SECONDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise DualCodecError(f"serve: {name} must be a number above 0, got {value!r}")
        for origin in self.origins:
            if not _is_origin(origin):
                raise DualCodecError(f"serve: an allowed origin must be like https://example.org, got {origin!r}")


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_origin(text: object) -> bool:
    """Whether a browser could send it: scheme, host and port alone, in small letters."""
    if not isinstance(text, str):
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https") and bool(parts.netloc) and text == f"{parts.scheme}://{parts.netloc}".lower()
    )
