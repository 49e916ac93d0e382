"""A WebSocket server: audio in and codes out, codes in and audio out, or both, while they come.

Importing this needs torch alone; a server needs aiohttp and prometheus_client, the extra `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._serving.options import ServeOptions
from .errors import DualCodecError, need_extra

if TYPE_CHECKING:
    from .model import DualCodec

__all__ = ["ServeOptions", "Server", "serve"]


class Server:
    """Serves a model to many clients, each a stream of its own; docs/serving.md describes the protocol.

    Args:
        model: in eval mode. Tasks that it can't do as audio comes are refused, with the reason.
        name: of the model, for clients.
        options: where it listens, and what it allows.

    Attributes:
        port: that it listens on, once started.

    Raises:
        DualCodecError: a model that can't stream.
        MissingExtraError: aiohttp or prometheus_client is missing.
    """

    def __init__(self, model: DualCodec, name: str = "tiny", options: ServeOptions | None = None) -> None:
        for package in ("aiohttp", "prometheus_client"):
            need_extra(package, "serve", "serve")
        from ._serving.protocol import ModelInfo
        from ._serving.stages import make_stages, warm_up
        from ._serving.streams import Streams

        self.options = options or ServeOptions()
        encoder, decoder, unsupported = make_stages(model, self.options.streams, self.options.lookahead)
        for stage in (encoder, decoder):
            if stage is not None:
                warm_up(stage, self.options.streams)
        settings = model.settings
        acoustic = (settings["codebook_size"],) * settings["n_codebooks"]
        self.info = ModelInfo(
            name=name,
            sample_rate=int(settings["sample_rate"]),
            hop_samples=int(model.dac.hop_length),
            codebook_sizes=(settings["semantic_codebook_size"], *acoustic),
            lookahead_frames=decoder.lookahead_frames,
            unsupported=unsupported,
        )
        self._streams = Streams(encoder, decoder, self.info, self.options.streams)
        self._runner: Any = None
        self._service: Any = None
        self.port = 0

    async def start(self) -> None:
        """Listens from now on.

        Raises:
            DualCodecError: the address can't be had.
        """
        from aiohttp import web

        from ._serving.app import Service

        self._service = Service(self._streams, self.info, self.options)
        runner = web.AppRunner(
            self._service.app(),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            keepalive_timeout=self.options.hello_s,  # ends connections that bring no whole request, too
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.options.host, self.options.port).start()
        except (OSError, UnicodeError) as error:
            await runner.cleanup()
            text = getattr(error, "strerror", None) or str(error)
            raise DualCodecError(f"cannot listen on {self.options.host} port {self.options.port}: {text}") from error
        self._streams.start()
        self._runner, self.port = runner, runner.addresses[0][1]

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"http://{host}:{self.port}/"

    async def stop(self) -> None:
        """Refuses new streams, lets what the others have sent leave, tells them, and ends."""
        self._service.stopping.set()
        for site in list(self._runner.sites):
            await site.stop()
        if self._service.connections:
            await asyncio.wait(self._service.connections, timeout=self.options.grace_s + 10)
        await self._runner.cleanup()
        self._streams.stop()


def serve(
    model: DualCodec,
    name: str = "tiny",
    options: ServeOptions | None = None,
    started: Callable[[Server], object] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends at once.

    Args:
        model, name, options: as for Server.
        started: called once the server listens.

    Raises:
        DualCodecError: as Server, or the address can't be had.
    """
    server = Server(model, name, options)
    from prometheus_client import disable_created_metrics

    disable_created_metrics()  # of the process, which is this server's: when each series began tells nobody anything
    gc.collect()
    gc.freeze()  # or a full collection, which looks through all of torch, would hold every stream up for 0.1 s
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_until_signal(server, started))


async def _until_signal(server: Server, started: Callable[[Server], object] | None) -> None:
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        if end.is_set():
            task.cancel()
        end.set()

    await server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if started is not None:
        started(server)
    await end.wait()
    await server.stop()
