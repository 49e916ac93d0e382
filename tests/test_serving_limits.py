"""The server's limits: clients that are silent, that don't read, or that ask for more than there is."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from serving import CODEBOOKS, Client, Place, check_pcm, decoded, offline, play
from test_serving import beside, model, speech

import dualcodec_ext as dx
from dualcodec_ext._serving.protocol import pcm_message
from dualcodec_ext._serving.streams import Stream
from dualcodec_ext._serving.worker import Result

__all__ = ["model", "speech"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")
FRAME_S = 0.02
MOST_STEP_S = 4 * FRAME_S  # what a step may add to a stream's queue


class Sender:
    """Every stream's: sends while `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = asyncio.Event()
        following = Stream.next

        async def following_once(stream: Stream) -> bytes | str:
            found = await following(stream)
            await self.go.wait()
            return found

        monkeypatch.setattr(Stream, "next", following_once)


async def read_on(place: Place) -> None:
    """Returns when the server has had every chance to read what lies in its sockets."""
    for _ in range(5):
        assert (await place.get("/healthz"))[0] == 200


# Silence -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pings", [False, True], ids=["nothing", "pings"])
@pytest.mark.parametrize(("limit", "counter"), [("hello_s", "refused"), ("idle_s", "dropped")])
def test_silent_clients_are_dropped(model: dx.DualCodec, limit: str, counter: str, pings: bool) -> None:
    """WebSocket's own pings are no messages."""

    async def ping(client: Client) -> None:
        while True:
            await client.socket.ping()
            await asyncio.sleep(0.01)

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            if limit == "idle_s":
                await client.hello()
            task = asyncio.create_task(ping(client) if pings else asyncio.sleep(0))
            try:
                assert (await client.end())[::2] == ("silent", 1008)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        assert (await place.metrics())[f"dualcodec_{counter}_total", "silent"] == 1

    play(model, scenario, **{limit: 0.3})


@pytest.mark.parametrize("half", [b"", b"GET /v1/stream HTTP/1.1\r\nHost"], ids=["nothing", "half a request"])
def test_connections_without_a_request_are_closed(model: dx.DualCodec, half: bytes) -> None:
    async def scenario(place: Place) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.server.port)
        writer.write(half)
        assert await reader.read() == b""
        writer.close()

    play(model, scenario, hello_s=0.2)


# Clients that don't read ---------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_dropped(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    """Its connection goes, and the others' streams go on."""
    codes = np.zeros((5000, CODEBOOKS), np.uint16)

    async def scenario(place: Place) -> None:
        async def trouble() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", place.server.port, limit=1024)
            key = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            key += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            writer.write(f"GET /v1/stream HTTP/1.1\r\nHost: x\r\n{key}\r\n".encode())
            writer.write(_frame(1, b'{"task": "decode"}'))
            transports: set[Any] = set()
            while place.server._streams.metrics.dropped.labels("too_slow")._value.get() == 0:
                if writer.transport.get_write_buffer_size() < 1 << 16 and not writer.transport.is_closing():
                    writer.write(_frame(2, b"C\0" + codes.tobytes()))
                await asyncio.sleep(0.01)
                connections = place.server._runner.server.connections
                transports.update(one.transport for one in connections if one.transport is not None)
            # Its socket closes though nobody reads what was to leave.
            await place.until(lambda: sum(one.get_extra_info("socket").fileno() < 0 for one in transports) == 1)
            writer.close()

        await beside(place, model, speech, trouble())
        assert not [stream for stream in place.server._streams.open_ones if stream.hello.task == "decode"]

    play(model, scenario, stall_s=0.2, ahead_s=2.0)


def _frame(opcode: int, payload: bytes) -> bytes:
    """A client's WebSocket frame, masked with zeros."""
    length = len(payload)
    head = bytes([0x80 | opcode])
    if length < 126:
        head += bytes([0x80 | length])
    else:
        head += bytes([0x80 | 127]) + length.to_bytes(8, "big")
    return head + bytes(4) + payload


def test_a_client_that_reads_late_gets_everything(
    model: dx.DualCodec, speech: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing leaves its queue stays bounded: the stream rests, and goes on when there is room."""
    codes = offline(model, np.tile(speech, 2))
    wave = decoded(model, codes)

    async def scenario(place: Place) -> None:
        sender, streams, most_s, steps = Sender(monkeypatch), place.server._streams, 0.0, 0
        loop, deliver = asyncio.get_running_loop(), streams._decoder._done

        def step_by_step(results: Sequence[Result]) -> None:
            """No step begins before the results of the last one are in the queues."""
            nonlocal steps
            steps += 1
            deliver(results)
            noted: Future[None] = Future()
            loop.call_soon_threadsafe(note, results, noted)
            noted.result(60)
            steps -= 1

        def note(results: Sequence[Result], noted: Future[None]) -> None:
            """In the loop, right behind what was delivered: later some of it may have left."""
            nonlocal most_s
            most_s = max(most_s, *(result.lane.owner.out_s for result in results))
            noted.set_result(None)

        async with place.client() as client:
            await client.hello("decode")
            (stream,) = streams.open_ones
            streams._decoder._done = step_by_step
            sending = asyncio.create_task(client.send_codes(codes, 10))
            await place.until(lambda: stream._paused and stream._frames > 0)
            await read_on(place)
            assert 1 < stream.out_s <= 1 + MOST_STEP_S and not sender.go.is_set()
            sender.go.set()
            await sending
            await client.flush()
            got = await client.clip()
            check_pcm(got.pcm, wave)
            assert got.flushed["frames"] == len(codes)
            await place.until(lambda: steps == 0)
        assert 1 < most_s <= 1 + MOST_STEP_S

    play(model, scenario, ahead_s=1.0)


def test_a_flood_of_pings_that_are_not_read(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualcodec_ext._serving import streams

    monkeypatch.setattr(streams, "_MOST_OUT_BYTES", 10000)
    most = 0

    async def scenario(place: Place) -> None:
        nonlocal most
        sender = Sender(monkeypatch)
        async with place.client() as client:
            await client.hello("decode")
            (stream,) = place.server._streams.open_ones
            say = stream.say

            def watched(message: dict[str, Any]) -> None:
                nonlocal most
                say(message)
                most = max(most, stream._out_bytes)

            stream.say = watched  # type: ignore[method-assign]
            text = json.dumps({"type": "ping", "id": "x" * 100})
            for _ in range(500):
                await client.socket.send_str(text)
            await place.until(lambda: stream._out_bytes > 10000)
            await read_on(place)
            sender.go.set()
            for _ in range(500):
                assert (await client.text())["type"] == "pong"

    play(model, scenario)
    assert 10000 < most < 10000 + 150


def test_a_flood_of_flushes(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        sender, most = Sender(monkeypatch), 0
        async with place.client() as client:
            await client.hello("decode")
            (stream,) = place.server._streams.open_ones
            worker, lane = stream.lanes[0]
            worker.pause(lane, True)
            put = stream.put

            def watched(*part: Any, **more: Any) -> None:
                nonlocal most
                put(*part, **more)
                most = max(most, len(stream._clips))

            stream.put = watched  # type: ignore[method-assign]
            for _ in range(200):
                await client.flush()
            await place.until(lambda: len(stream._clips) > 16)
            await read_on(place)
            worker.pause(lane, False)
            sender.go.set()
            for _ in range(200):
                assert (await client.clip()).flushed == {"type": "flushed", "frames": 0, "samples": 0}
            assert most == 17

    play(model, scenario)


# What there is to have ------------------------------------------------------------------------------------------------


def test_connections_that_ended_count_no_more(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualcodec_ext._serving import app

    monkeypatch.setattr(app, "_SPARE_CONNECTIONS", 2)

    async def scenario(place: Place) -> None:
        for _ in range(10):
            async with place.client() as client:
                await client.hello("decode")
            await place.until(lambda: not place.server._streams.open_ones)
        async with place.client() as client:
            await client.hello("decode")

    play(model, scenario, streams=1)


def test_nobody_raises_the_servers_limit(model: dx.DualCodec) -> None:
    async def scenario(place: Place) -> None:
        for asked_s, given_s in ((1e9, 3.0), (0.5, 0.5)):
            async with place.client() as client:
                await client.hello("decode", max_ahead_s=asked_s)
                (stream,) = place.server._streams.open_ones
                assert stream.hello.ahead_s == given_s
            await place.until(lambda: not place.server._streams.open_ones)

    play(model, scenario, ahead_s=3.0)


def test_messages_of_few_samples(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    """More than are kept apart, before they make a frame."""
    part = speech[10000:11500]

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            await client.hello("encode")
            await client.send_pcm(part, 3)
            await client.flush()
            assert np.array_equal((await client.clip()).codes, offline(model, part))

    play(model, scenario)


def test_neighbours_with_other_codebooks(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    """What waits side by side for the decoder comes out as alone."""
    codes = offline(model, speech)[:40]

    async def scenario(place: Place) -> None:
        stage, go_on = place.server._streams._decoder.stage, threading.Event()
        run = stage.run

        def wait(*arguments: Any) -> Any:
            go_on.wait()
            return run(*arguments)

        stage.run = wait  # type: ignore[method-assign]
        try:
            async with place.client() as one, place.client() as three, place.client() as ten:
                clients = {1: one, 3: three, 10: ten}
                for books, client in clients.items():
                    await client.hello("decode", codebooks=books)
                    await client.send_codes(codes[:, :books], 40)
                    await client.flush()
                streams = place.server._streams.open_ones
                await place.until(lambda: all(stream._frames == 40 for stream in streams))
                go_on.set()
                for books, client in clients.items():
                    check_pcm((await client.clip()).pcm, decoded(model, codes[:, :books]))
        finally:
            go_on.set()

    play(model, scenario)


def test_samples_are_clipped() -> None:
    samples = np.array([0.0, 0.25, -0.25, 32767 / 32768, 1.0, -1.0, 1.5, -1.5, 1e9, -1e9, 1.6 / 32768], np.float32)
    message = pcm_message(samples)
    assert message[:2] == b"P\0"
    wanted = [0, 8192, -8192, 32767, 32767, -32768, 32767, -32768, 32767, -32768, 2]
    assert np.frombuffer(message[2:], "<i2").tolist() == wanted


def test_what_is_not_finite_is_not_sent(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        stage = place.server._streams._decoder.stage
        run = stage.run
        stage.run = lambda *given: [np.full_like(x, np.nan) for x in run(*given)]  # type: ignore[method-assign]
        async with place.client() as client:
            await client.hello("decode")
            await client.send_codes(offline(model, speech)[:5], 5)
            assert await client.end() == ("internal", "the model's output is not finite", 1011)

    play(model, scenario)


def test_a_slot_is_free_again_where_ready_cannot_be_sent(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualcodec_ext._serving import app

    async def scenario(place: Place) -> None:
        def gone(*_: Any) -> str:
            raise ConnectionResetError

        with monkeypatch.context() as patch:
            patch.setattr(app, "ready_text", gone)
            async with place.client() as client:
                await client.socket.send_str('{"task": "decode"}')
                await client.socket.receive()
        async with place.client() as client:
            await client.hello("decode")

    play(model, scenario, streams=1)


def test_metrics_while_a_step_is_held_up(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        sender, stage, go_on = Sender(monkeypatch), place.server._streams._decoder.stage, threading.Event()
        run, held = stage.run, threading.Event()

        def wait(*arguments: Any) -> Any:
            held.set()
            go_on.wait()
            return run(*arguments)

        stage.run = wait  # type: ignore[method-assign]
        codes, streams = np.zeros((4, CODEBOOKS), np.uint16), place.server._streams.open_ones
        try:
            async with place.client() as one, place.client() as two:
                for client in (one, two):
                    await client.hello("decode")
                await one.send_codes(codes[:1], 1)
                await place.until(held.is_set)
                for client in (one, two):
                    await client.send_codes(codes, 4)
                await place.until(lambda: sum(stream._frames for stream in streams) == 9)
                found = await place.metrics()
                assert found["dualcodec_queue_seconds", "in"] == pytest.approx(9 * FRAME_S)
                assert found["dualcodec_queue_seconds", "out"] == 0
                await asyncio.sleep(0.1)
                go_on.set()
                await place.until(lambda: sum(stream._frames for stream in streams) == 0)
                found = await place.metrics()
                sender.go.set()
                assert found["dualcodec_queue_seconds", "in"] == 0
                assert found["dualcodec_queue_seconds", "out"] == pytest.approx(9 * FRAME_S)
                assert found["dualcodec_frames_total", "decode"] == 9
                assert found["dualcodec_audio_seconds_total", "decode"] == pytest.approx(9 * FRAME_S)
                assert found["dualcodec_step_slots_count", "decode"] == 2  # one alone, then both by four frames
                assert found["dualcodec_step_slots_sum", "decode"] == 3
                assert found["dualcodec_time_to_first_audio_seconds_count", "decode"] == 2
                assert found["dualcodec_time_to_first_audio_seconds_sum", "decode"] >= 2 * 0.1
        finally:
            go_on.set()

    play(model, scenario)
