"""What goes over the wire, and what of it is refused; docs/serving.md describes it for those who write clients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

VERSION = 1
TASKS = ("roundtrip", "encode", "decode")
PCM, CODES = b"P\0", b"C\0"
# WebSocket's own close codes (RFC 6455 and IANA's list), by the code of the error that is told first.
CLOSE_CODES = {
    "full": 1013,
    "shutdown": 1013,
    "bad_request": 1008,
    "unsupported": 1008,
    "too_slow": 1008,
    "silent": 1008,
    "too_large": 1009,
    "malformed": 1007,
    "internal": 1011,
}
_HELLO = ("task", "codebooks", "max_ahead_s")


class Drop(Exception):
    """Why the server ends a stream.

    Args:
        code: a key of CLOSE_CODES.
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def text(self) -> str:
        """The message that tells the client."""
        return json.dumps({"type": "error", "code": self.code, "message": self.message})


@dataclass(frozen=True)
class ModelInfo:
    """What a client has to know of the model.

    Args:
        name: of the model.
        sample_rate: of all audio, in Hz.
        hop_samples: samples of a frame.
        codebook_sizes: entries of each codebook, the semantic one first.
        lookahead_frames: frames by which decoded audio runs behind.
        unsupported: for each task that the model can't serve, why.
    """

    name: str
    sample_rate: int
    hop_samples: int
    codebook_sizes: tuple[int, ...]
    lookahead_frames: int
    unsupported: Mapping[str, str]

    @property
    def frame_s(self) -> float:
        """The length of a frame."""
        return self.hop_samples / self.sample_rate

    def to_dict(self) -> dict[str, Any]:
        """As `ready` and /v1/info say it."""
        return {
            "name": self.name,
            "sample_rate": self.sample_rate,
            "hop_samples": self.hop_samples,
            "frame_rate": self.sample_rate / self.hop_samples,
            "codebook_sizes": list(self.codebook_sizes),
            "lookahead_frames": self.lookahead_frames,
            "latency_ms": 1e3 * self.lookahead_frames * self.frame_s,
            "tasks": [task for task in TASKS if task not in self.unsupported],
        }


@dataclass(frozen=True)
class Hello:
    """What a client asks for in its first message.

    Args:
        task: one of TASKS.
        codebooks: to use, the semantic one among them.
        ahead_s: seconds that the server takes in before they are worked on.
    """

    task: str
    codebooks: int
    ahead_s: float


def _object(text: str, code: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Drop(code, f"a text message must be a JSON object, got {shown(text)}") from None
    if not isinstance(value, dict):
        raise Drop(code, f"a text message must be a JSON object, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value of a client's, short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_hello(text: str, model: ModelInfo, ahead_s: float) -> Hello:
    """Reads a client's first message.

    Args:
        text: the message.
        model: what is served.
        ahead_s: the most that a stream may have in its queue.
    Returns:
        What the client asks for.
    Raises:
        Drop: bad_request or unsupported.
    """
    asked = _object(text, "bad_request")
    for key in asked:
        if key not in _HELLO:
            raise Drop("bad_request", f"the first message may hold {', '.join(_HELLO)}, got {shown(key)}")
    task = asked.get("task")
    if task not in TASKS:
        raise Drop("bad_request", f"task must be one of {', '.join(TASKS)}, got {shown(task)}")
    most = len(model.codebook_sizes)
    codebooks = asked.get("codebooks", most)
    if isinstance(codebooks, bool) or not isinstance(codebooks, int) or not 1 <= codebooks <= most:
        raise Drop("bad_request", f"codebooks must be a whole number from 1 to {most}, got {shown(codebooks)}")
    ahead = asked.get("max_ahead_s", ahead_s)
    if isinstance(ahead, bool) or not isinstance(ahead, int | float) or not math.isfinite(ahead) or ahead <= 0:
        raise Drop("bad_request", f"max_ahead_s must be a number above 0, got {shown(ahead)}")
    if task in model.unsupported:
        raise Drop("unsupported", f"task {task}: {model.unsupported[task]}")
    return Hello(task, codebooks, min(float(ahead), ahead_s))


def parse_control(text: str) -> dict[str, Any]:
    """Reads a later text message: `flush` or `ping`.

    Raises:
        Drop: malformed.
    """
    asked = _object(text, "malformed")
    kind = asked.get("type")
    wanted = {"flush": {"type"}, "ping": {"type", "id"}}.get(kind) if isinstance(kind, str) else None
    if wanted is None:
        raise Drop("malformed", f"type must be flush or ping, got {shown(kind)}")
    if asked.keys() - wanted:
        raise Drop("malformed", f"a {kind} may hold {', '.join(sorted(wanted))}, got {shown(sorted(asked))}")
    return asked


def parse_data(data: bytes, hello: Hello, sizes: Sequence[int]) -> npt.NDArray[Any]:
    """Reads a binary message.

    Args:
        data: the message.
        hello: what the stream is for.
        sizes: entries of each codebook.
    Returns:
        Samples float32 [n], or codes int64 [F, codebooks].
    Raises:
        Drop: malformed.
    """
    kind, wanted = data[:2], CODES if hello.task == "decode" else PCM
    if len(data) < 2:
        raise Drop("malformed", f"a binary message must begin with 2 bytes of header, got {len(data)}")
    if kind != wanted:
        raise Drop("malformed", f"data of task {hello.task} must begin with {_hex(wanted)}, got {_hex(kind)}")
    if len(data) % 2:
        raise Drop("malformed", f"a payload must be of 16-bit numbers, got {len(data) - 2} bytes")
    if wanted == PCM:
        return np.frombuffer(data, "<i2", offset=2).astype(np.float32) / 32768
    codes = np.frombuffer(data, "<u2", offset=2)
    if len(codes) % hello.codebooks:
        raise Drop("malformed", f"codes must be {hello.codebooks} per frame, got {len(codes)}")
    codes = codes.reshape(-1, hello.codebooks).astype(np.int64)
    over = codes >= np.asarray(sizes[: hello.codebooks])
    if over.any():
        frame, book = (int(i) for i in np.argwhere(over)[0])
        code, most = int(codes[frame, book]), sizes[book] - 1
        raise Drop("malformed", f"a code of codebook {book} must be at most {most}, got {code} at frame {frame}")
    return codes


def _hex(data: bytes) -> str:
    return " ".join(f"{byte:02x}" for byte in data)


def pcm_message(samples: npt.NDArray[np.float32]) -> bytes:
    """Samples [n], full scale 1, as the server sends them; what lies outside is clipped."""
    whole = np.clip(np.rint(samples * 32768), -32768, 32767)
    return PCM + whole.astype("<i2").tobytes()


def codes_message(codes: npt.NDArray[np.int64]) -> bytes:
    """Codes [F, codebooks] as the server sends them."""
    return CODES + codes.astype("<u2").tobytes()


def ready_text(hello: Hello, model: ModelInfo) -> str:
    """The server's first message."""
    ready = {"type": "ready", "protocol": VERSION, "task": hello.task, "codebooks": hello.codebooks}
    return json.dumps({**ready, "model": model.to_dict()})
