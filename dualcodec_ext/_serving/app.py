"""Connections: who may open one, what is read from it and written to it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import WSMsgType, web

from .metrics import CONTENT_TYPE
from .options import ServeOptions, is_loopback
from .protocol import CLOSE_CODES, Drop, ModelInfo, parse_control, parse_data, parse_hello, ready_text
from .streams import Stream, Streams

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
_SPARE_CONNECTIONS = 64  # beyond the streams: those that are told that the server is full, and those yet to say hello
_CLOSE_S = 2.0  # for a client to answer the end of its stream
_READ_S = 0.2  # for a client to read why its message broke the protocol, before the socket closes on what it sends
_UPGRADE = "this address takes WebSocket connections: see docs/serving.md\n"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; "
    "img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class _Socket(web.WebSocketResponse):
    """Tells a client why before it closes on a message that broke the protocol or was too large."""

    told = False  # the client has had the reason
    broken: Drop | None = None

    def __init__(self, longest: int) -> None:
        super().__init__(max_msg_size=longest, timeout=_CLOSE_S, compress=False)
        self._longest = longest

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        if code in (1002, 1003, 1007, 1009) and not self.told and not self.closed:
            self.told = True
            if code == 1009:
                self.broken = Drop("too_large", f"a message must be of at most {self._longest} bytes")
            else:
                self.broken = Drop("malformed", "a message must keep to the WebSocket protocol")
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self.send_str(self.broken.text())
                    await asyncio.sleep(_READ_S)
        return bool(await super().close(code=code, message=message, drain=drain))


class Service:
    """What the addresses answer.

    Args:
        streams: the workers and their streams.
        model: what is served.
        options: limits.
    """

    def __init__(self, streams: Streams, model: ModelInfo, options: ServeOptions) -> None:
        self.streams, self.model, self.options = streams, model, options
        self.stopping = asyncio.Event()
        self.connections: set[asyncio.Task[Any]] = set()

    def app(self) -> web.Application:
        """The application of aiohttp."""
        app = web.Application(middlewares=[_add_headers])
        app.router.add_get("/", self._index)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/info", self._info)
        app.router.add_get("/v1/stream", self._stream)
        app.router.add_static("/static/", STATIC)
        return app

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(STATIC / "index.html")

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if self.stopping.is_set():
            return web.Response(text="stopping\n", status=503)
        return web.Response(text="ok\n")

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self.streams.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.model.to_dict())

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self._check_origin(request)
        if len(self.connections) >= self.options.streams + _SPARE_CONNECTIONS:
            self.streams.metrics.refused.labels("full").inc()
            raise web.HTTPServiceUnavailable(text="too many connections, try again later\n")
        socket = _Socket(self.options.message_bytes)
        if not socket.can_prepare(request):
            # As RFC 9110 has it: what to upgrade to goes along.
            raise web.HTTPUpgradeRequired(text=_UPGRADE, headers={"Upgrade": "websocket", "Connection": "Upgrade"})
        await socket.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            await _Connection(self, socket, request).run()
        finally:
            self.connections.discard(task)
        return socket

    def _check_origin(self, request: web.Request) -> None:
        """Pages of other sites may not use a server that their visitor can reach."""
        origin = request.headers.get("Origin")
        if origin is None or origin in self.options.origins:
            return
        try:
            parts = urlsplit(origin)
        except ValueError:
            own = False
        else:
            own = parts.netloc == request.host
            if is_loopback(self.options.host):
                # Any name may be made to point here, and its page then has this server as its own.
                own = own and is_loopback(parts.hostname or "")
        if not own:
            raise web.HTTPForbidden(text=f"pages of {origin[:200]} may not open streams here: see --allow-origin\n")


@web.middleware
async def _add_headers(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    if not response.prepared:
        response.headers.update({key: value for key, value in _HEADERS.items() if key not in response.headers})
    return response


class _Connection:
    """One client from its first message to its last."""

    def __init__(self, service: Service, socket: _Socket, request: web.Request) -> None:
        self._service, self._socket, self._request = service, socket, request
        self._options, self._metrics = service.options, service.streams.metrics

    async def run(self) -> None:
        stream: Stream | None = None
        reason = "closed by the client"
        try:
            stream = await self._unless_stopping(self._open())
            if stream is None:
                return
            log.info("stream %d: %s opened, %d codebooks", stream.number, stream.hello.task, stream.hello.codebooks)
            log.debug("stream %d: from %s", stream.number, self._request.remote)
            await self._serve(stream)
        except Drop as drop:
            reason = f"{drop.code}: {drop.message}"
            if stream is None:
                log.info("stream refused, %s", reason)
            (self._metrics.dropped if stream is not None else self._metrics.refused).labels(drop.code).inc()
            if drop is not self._socket.broken:
                await self._tell(drop)
        except (ConnectionError, TimeoutError):
            reason = "the client has gone"
        finally:
            if stream is not None:
                self._service.streams.close(stream)
                seconds = asyncio.get_running_loop().time() - stream.since_s
                log.info("stream %d: %s ended after %.1f s, %s", stream.number, stream.hello.task, seconds, reason)

    async def _unless_stopping(self, opening: Coroutine[Any, Any, Stream | None]) -> Stream | None:
        first, stopping = asyncio.create_task(opening), asyncio.create_task(self._service.stopping.wait())
        try:
            await asyncio.wait((first, stopping), return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                return first.result()
            raise Drop("shutdown", "the server stops")
        finally:
            await _cancel((first, stopping))

    async def _open(self) -> Stream | None:
        """Waits for the first message; None: the client has gone."""
        limit_s = self._options.hello_s
        text = await self._receive(limit_s, f"the first message must come within {limit_s:g} s")
        if text is None:
            return None
        if not isinstance(text, str):
            raise Drop("bad_request", "the first message must be text, got binary")
        hello = parse_hello(text, self._service.model, self._options.ahead_s)
        stream = self._service.streams.open(hello)
        try:
            await self._socket.send_str(ready_text(hello, self._service.model))
        except BaseException:
            self._service.streams.close(stream)
            raise
        return stream

    async def _receive(self, limit_s: float, otherwise: str) -> str | bytes | None:
        """The next message; None: the client has gone."""
        try:
            async with asyncio.timeout(limit_s):  # receive's own limit begins anew at every ping
                message = await self._socket.receive()
        except TimeoutError:
            raise self._socket.broken or Drop("silent", otherwise) from None
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            data: str | bytes = message.data
            return data
        if self._socket.broken is not None:
            raise self._socket.broken
        return None

    async def _serve(self, stream: Stream) -> None:
        reader, sender = asyncio.create_task(self._read(stream)), asyncio.create_task(self._send(stream))
        stopping = asyncio.create_task(self._service.stopping.wait())
        tasks = [reader, sender, stopping]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, sender):
                if task.done():
                    task.result()
                    return
            reader.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.grace_s):
                    await stream.drained()
            raise Drop("shutdown", "the server stops")
        finally:
            await _cancel(tasks)

    async def _read(self, stream: Stream) -> None:
        silent = f"a message must come every {self._options.idle_s:g} s"
        sizes = self._service.model.codebook_sizes
        while True:
            await stream.room()
            message = await self._receive(self._options.idle_s, silent)
            if message is None:
                return
            if isinstance(message, bytes):
                stream.put(parse_data(message, stream.hello, sizes))
                continue
            control = parse_control(message)
            if control["type"] == "flush":
                stream.put(parse_data(_EMPTY[stream.hello.task == "decode"], stream.hello, sizes), ended=True)
            else:
                stream.say({"type": "pong", "id": control.get("id")})

    async def _send(self, stream: Stream) -> None:
        while True:
            data = await stream.next()
            try:
                async with asyncio.timeout(self._options.stall_s):
                    if isinstance(data, str):
                        await self._socket.send_str(data)
                    else:
                        await self._socket.send_bytes(data)
            except TimeoutError:
                raise Drop("too_slow", f"nothing was read for {self._options.stall_s:g} s") from None
            stream.sent()

    async def _tell(self, drop: Drop) -> None:
        """Ends the connection, with the reason where the client still reads."""
        transport, task = self._request.transport, asyncio.current_task()
        if drop.code == "too_slow":
            # A reason would lie behind what it does not read, and closing would wait for that.
            if transport is not None:
                transport.abort()
            return
        try:
            with contextlib.suppress(ConnectionError, TimeoutError, RuntimeError):
                async with asyncio.timeout(_CLOSE_S):
                    self._socket.told = True
                    await self._socket.send_str(drop.text())
                # RFC 6455 leaves 123 bytes for a reason.
                reason = drop.message.encode("ascii", "replace")[:120]
                await self._socket.close(code=CLOSE_CODES[drop.code], message=reason)
        except asyncio.CancelledError:
            # aiohttp raises it, too, where the sender was cancelled while it waited for the client to read.
            if task is None or task.cancelling():
                raise


_EMPTY = (b"P\0", b"C\0")


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
