"""What the tests of the server share: a server and clients in one event loop, on sockets of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import torch
from tolerances import F32, TOLERANCE

import dualcodec_ext as dx
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext.serving import ServeOptions, Server

HOP, RATE_HZ, CODEBOOKS = 480, 24000, 10
LIMIT_S = 240  # for a scenario on a machine under load: one that hangs fails, and nothing else is decided by it


@dataclass
class Got:
    """What came back of one clip."""

    codes: np.ndarray[Any, Any]  # [F, codebooks]
    pcm: np.ndarray[Any, Any]  # [S] int16
    flushed: dict[str, Any]
    kinds: str  # C and P in the order of the messages


class Client:
    """One WebSocket, as a user's program would have it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.codebooks = CODEBOOKS

    async def hello(self, task: str = "roundtrip", **more: Any) -> dict[str, Any]:
        self.codebooks = more.get("codebooks", CODEBOOKS)
        await self.socket.send_str(json.dumps({"task": task, **more}))
        ready = await self.text()
        assert ready["type"] == "ready", ready
        return ready

    async def text(self) -> dict[str, Any]:
        message = await self.socket.receive()
        assert message.type == aiohttp.WSMsgType.TEXT, message
        found: dict[str, Any] = json.loads(message.data)
        return found

    async def send_pcm(self, pcm: np.ndarray[Any, Any], cut: int) -> None:
        for at in range(0, len(pcm), cut):
            await self.socket.send_bytes(b"P\0" + pcm[at : at + cut].astype("<i2").tobytes())

    async def send_codes(self, codes: np.ndarray[Any, Any], cut: int) -> None:
        for at in range(0, len(codes), cut):
            await self.socket.send_bytes(b"C\0" + codes[at : at + cut].astype("<u2").tobytes())

    async def flush(self) -> None:
        await self.socket.send_str('{"type": "flush"}')

    async def clip(self) -> Got:
        """Everything up to `flushed`."""
        parts: dict[str, list[bytes]] = {"C": [], "P": []}
        kinds = ""
        while True:
            message = await self.socket.receive()
            if message.type == aiohttp.WSMsgType.TEXT:
                flushed = json.loads(message.data)
                assert flushed["type"] == "flushed", flushed
                break
            assert message.type == aiohttp.WSMsgType.BINARY, message
            kind = chr(message.data[0])
            assert message.data[1] == 0
            parts[kind].append(message.data[2:])
            kinds += kind
        codes = np.frombuffer(b"".join(parts["C"]), "<u2").reshape(-1, self.codebooks)
        return Got(codes, np.frombuffer(b"".join(parts["P"]), "<i2"), flushed, kinds)

    async def end(self) -> tuple[str, str, int]:
        """The error that ends the stream: code, message, close code. What came before it is passed over."""
        while (message := await self.socket.receive()).type == aiohttp.WSMsgType.BINARY:
            pass
        assert message.type == aiohttp.WSMsgType.TEXT, message
        error = json.loads(message.data)
        assert error.keys() == {"type", "code", "message"} and error["type"] == "error", error
        assert "\n" not in error["message"]
        closed = await self.socket.receive()
        assert closed.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED), closed
        assert self.socket.close_code is not None
        return error["code"], error["message"], self.socket.close_code


class Place:
    """A running server, and how to reach it."""

    def __init__(self, server: Server, session: aiohttp.ClientSession) -> None:
        self.server, self.session = server, session

    @asynccontextmanager
    async def client(self, **how: Any) -> AsyncIterator[Client]:
        async with self.session.ws_connect(f"{self.server.url}v1/stream", **how) as socket:
            yield Client(socket)

    async def get(self, path: str) -> tuple[int, str, Any]:
        async with self.session.get(self.server.url.rstrip("/") + path) as answer:
            return answer.status, await answer.text(), answer.headers

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """Every sample, by its name and its labels' values."""
        from prometheus_client.parser import text_string_to_metric_families

        text = (await self.get("/metrics"))[1]
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[(sample.name, *sample.labels.values())] = sample.value
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the server does on its own."""
        while not condition():
            await asyncio.sleep(0.005)


def play(model: dx.DualCodec, scenario: Callable[[Place], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Runs a scenario beside a server of its own."""

    async def run() -> None:
        async with asyncio.timeout(LIMIT_S):
            server = Server(model, options=ServeOptions(**{"port": 0, "streams": 4, **limits}))
            await server.start()
            try:
                async with aiohttp.ClientSession() as session:
                    await scenario(Place(server, session))
            finally:
                await server.stop()

    asyncio.run(run())


def offline(model: dx.DualCodec, pcm: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The codes [F, codebooks] of a whole clip."""
    audio = torch.from_numpy(pcm.astype(np.float32) / 32768)[None, None]
    semantic, acoustic = model.encode(audio)
    assert acoustic is not None
    return torch.cat([semantic, acoustic], 1)[0].T.cpu().numpy()


def decoded(model: dx.DualCodec, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The samples of a whole clip's codes, as 16-bit numbers that were not rounded."""
    tensor = torch.from_numpy(codes.astype(np.int64)).T[None]
    wave = model.decode_from_codes(tensor[:, :1], tensor[:, 1:] if tensor.shape[1] > 1 else None)
    return np.clip(wave[0, 0].double().cpu().numpy() * 32768, -32768, 32767)


def check_pcm(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 0.5 + 32768 * TOLERANCE["stream, decode", F32]


def voice() -> np.ndarray[Any, Any]:
    """2 s of voice in 16 bits, and a last frame that is not whole."""
    return np.rint(np.resize(vowels("aieou").samples, 2 * RATE_HZ + 111) * 32767).astype(np.int16)
