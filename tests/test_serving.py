"""`dualcodec-ext serve`: what comes over the wire is what whole clips give, and no client touches another."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest
from serving import CODEBOOKS, HOP, RATE_HZ, Place, check_pcm, decoded, offline, play, voice

import dualcodec_ext as dx

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> dx.DualCodec:
    return dx.DualCodec.from_pretrained("tiny")


@pytest.fixture(scope="module")
def speech() -> np.ndarray[Any, Any]:
    return voice()


# What clips become ---------------------------------------------------------------------------------------------------


def test_neighbours_cut_differently_get_what_whole_clips_give(
    model: dx.DualCodec, speech: np.ndarray[Any, Any]
) -> None:
    clips = [speech, -speech[:30000], speech[::-1].copy(), np.zeros(HOP, np.int16)]
    cuts = [HOP, 777, 12345, 1]

    async def one(place: Place, pcm: np.ndarray[Any, Any], cut: int) -> None:
        async with place.client() as client:
            ready = await client.hello()
            assert ready["model"]["hop_samples"] == HOP and ready["model"]["lookahead_frames"] == 0
            await client.send_pcm(pcm, cut)
            await client.flush()
            got, codes = await client.clip(), offline(model, pcm)
            assert np.array_equal(got.codes, codes)
            check_pcm(got.pcm, decoded(model, codes))
            assert got.flushed == {"type": "flushed", "frames": len(codes), "samples": len(codes) * HOP}
            assert got.kinds == "CP" * (len(got.kinds) // 2)

    async def scenario(place: Place) -> None:
        await asyncio.gather(*(one(place, pcm, cut) for pcm, cut in zip(clips, cuts, strict=True)))

    play(model, scenario)


def test_bits_depend_on_no_neighbour(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    """Alone in one message, and in pieces beside others, the same bytes."""
    found: list[np.ndarray[Any, Any]] = []

    async def one(place: Place, pcm: np.ndarray[Any, Any], cut: int, keep: bool) -> None:
        async with place.client() as client:
            await client.hello()
            await client.send_pcm(pcm, cut)
            await client.flush()
            got = await client.clip()
            if keep:
                found.append(got.pcm)

    async def scenario(place: Place) -> None:
        await one(place, speech, len(speech), True)
        await asyncio.gather(
            *(one(place, np.roll(speech, 999 * i), 500 + 77 * i, False) for i in range(1, 4)),
            one(place, speech, 501, True),
        )

    play(model, scenario)
    assert np.array_equal(*found)


@pytest.mark.parametrize("codebooks", [1, 2, 7, CODEBOOKS])
def test_tasks_and_codebooks(model: dx.DualCodec, speech: np.ndarray[Any, Any], codebooks: int) -> None:
    codes = offline(model, speech)[:, :codebooks]
    wave = decoded(model, codes)

    async def scenario(place: Place) -> None:
        async with place.client() as encoder, place.client() as decoder, place.client() as both:
            await encoder.hello("encode", codebooks=codebooks)
            await decoder.hello("decode", codebooks=codebooks)
            ready = await both.hello("roundtrip", codebooks=codebooks)
            assert (ready["task"], ready["codebooks"], ready["protocol"]) == ("roundtrip", codebooks, 1)
            for client in (encoder, both):
                await client.send_pcm(speech, 1000)
                await client.flush()
            await decoder.send_codes(codes, 3)
            await decoder.flush()
            encoded, played, twice = await encoder.clip(), await decoder.clip(), await both.clip()
            assert np.array_equal(encoded.codes, codes) and not len(encoded.pcm)
            assert encoded.flushed == {"type": "flushed", "frames": len(codes), "samples": 0}
            assert not len(played.codes) and played.flushed["samples"] == len(wave) == len(played.pcm)
            check_pcm(played.pcm, wave)
            assert np.array_equal(twice.codes, codes) and np.array_equal(twice.pcm, played.pcm)

    play(model, scenario)


def test_flush_begins_a_new_clip(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        async with place.client() as client:
            await client.hello()
            for _ in range(2):  # nothing has come
                await client.flush()
                assert (await client.clip()).flushed == {"type": "flushed", "frames": 0, "samples": 0}
            await client.socket.send_bytes(b"P\0")
            for pcm in (speech[:5000], speech[:1], speech[:5000]):  # all under way before the first is read
                await client.send_pcm(pcm, 700)
                await client.flush()
            await client.flush()
            first, one, again, none = [await client.clip() for _ in range(4)]
            assert np.array_equal(first.pcm, again.pcm) and np.array_equal(first.codes, offline(model, speech[:5000]))
            assert one.flushed["samples"] == HOP and none.flushed["frames"] == 0
            await client.socket.send_str('{"type": "ping", "id": {"a": [1, null]}}')
            assert await client.text() == {"type": "pong", "id": {"a": [1, None]}}

    play(model, scenario)


def test_lookahead_of_a_model_without_an_encoder() -> None:
    """A centred decoder runs behind, and flush gives the rest; what its encoder can't do is refused."""
    from dualcodec_ext import testing

    model = dx.accelerate(testing.seeded_model(testing.TINY))
    hop, stages = model.dac.hop_length, testing.TINY["n_codebooks"]
    generator = np.random.default_rng(0)
    entries = min(testing.TINY["codebook_size"], testing.TINY["semantic_codebook_size"])
    codes = generator.integers(0, entries, (40, 1 + stages))
    wave = decoded(model, codes)

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            ready = await client.hello("decode")
            ahead = ready["model"]["lookahead_frames"]
            assert ahead > 0 and ready["model"]["latency_ms"] == pytest.approx(
                1e3 * ahead * hop / ready["model"]["sample_rate"]
            )
            assert ready["model"]["tasks"] == ["decode"]
            await client.send_codes(codes, 1)
            await client.flush()
            got = await client.clip()
            check_pcm(got.pcm, wave)
            assert got.flushed == {"type": "flushed", "frames": 40, "samples": len(wave)}
        async with place.client() as client:
            await client.socket.send_str('{"task": "encode"}')
            code, message, closed = await client.end()
            assert (code, closed) == ("unsupported", 1008) and "features" in message

    play(model, scenario)


# Clients that ask for too much, and bad ones -------------------------------------------------------------------------

HELLOS = {
    "": 'must be a JSON object, got ""',
    "[]": r"must be a JSON object, got \[\]",
    "{": 'must be a JSON object, got "{"',
    "GET / HTTP/1.1\n": r'must be a JSON object, got "GET / HTTP/1\.1\\n"',
    "[" * 100000: r'must be a JSON object, got "\[{56}\.\.\.',
    "{}": "task must be one of roundtrip, encode, decode, got null",
    '{"task": "sing"}': 'got "sing"',
    '{"task": "encode", "codebooks": 0}': "codebooks must be a whole number from 1 to 10, got 0",
    '{"task": "encode", "codebooks": 11}': "got 11",
    '{"task": "encode", "codebooks": true}': "got true",
    '{"task": "encode", "codebooks": 2.0}': r"got 2\.0",
    '{"task": "encode", "max_ahead_s": NaN}': "max_ahead_s must be a number above 0, got NaN",
    '{"task": "encode", "max_ahead_s": -1}': "got -1",
    '{"task": "encode", "colour": 1}': 'the first message may hold task, codebooks, max_ahead_s, got "colour"',
}
DATA: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("encode", b"", "must begin with 2 bytes of header, got 0"),
    "one byte": ("encode", b"P", "got 1"),
    "reserved byte": ("encode", b"P\1\0\0", "data of task encode must begin with 50 00, got 50 01"),
    "unknown": ("encode", b"X\0", "got 58 00"),
    "codes to an encoder": ("encode", b"C\0\0\0", "got 43 00"),
    "codes to both": ("roundtrip", b"C\0\0\0", "got 43 00"),
    "samples to a decoder": ("decode", b"P\0\0\0", "task decode must begin with 43 00, got 50 00"),
    "half a sample": ("encode", b"P\0\0\0\0", "16-bit numbers, got 3 bytes"),
    "half a frame": ("decode", b"C\0" + bytes(2 * 9), "codes must be 10 per frame, got 9"),
    "semantic code": ("decode", b"C\0" + b"\0\x08" + bytes(18), "codebook 0 must be at most 2047, got 2048 at frame 0"),
    "acoustic code": ("decode", b"C\0" + bytes(20) + bytes(18) + b"\0\x04", "9 must be at most 1023, got 1024 at fr"),
    "text": ("encode", "hello", 'must be a JSON object, got "hello"'),
    "a list": ("encode", "[1]", "must be a JSON object, got"),
    "no type": ("encode", "{}", "type must be flush or ping, got null"),
    "type": ("encode", '{"type": ["flush"]}', "type must be flush or ping"),
    "keys": ("encode", '{"type": "flush", "now": 1}', "a flush may hold type, got"),
}


async def beside(place: Place, model: dx.DualCodec, speech: np.ndarray[Any, Any], trouble: Any) -> None:
    """One client whose clip is under way while others make trouble."""
    half = len(speech) // 2
    async with place.client() as client:
        await client.hello()
        await client.send_pcm(speech[:half], 1000)
        await trouble
        await client.send_pcm(speech[half:], 1000)
        await client.flush()
        got = await client.clip()
        assert np.array_equal(got.codes, offline(model, speech))


def test_bad_first_messages(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        async def trouble() -> None:
            for text, wanted in HELLOS.items():
                async with place.client() as client:
                    await client.socket.send_str(text)
                    code, message, closed = await client.end()
                    assert (code, closed) == ("bad_request", 1008)
                    assert re.search(wanted, message), message
            async with place.client() as client:
                await client.socket.send_bytes(b"P\0")
                assert (await client.end())[0] == "bad_request"

        await beside(place, model, speech, trouble())
        found = await place.metrics()
        assert found["dualcodec_refused_total", "bad_request"] == len(HELLOS) + 1
        assert found["dualcodec_streams_total", "roundtrip"] == 1 and found["dualcodec_streams_total", "encode"] == 0

    play(model, scenario)


def test_malformed_data(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        async def trouble() -> None:
            for name, (task, data, wanted) in DATA.items():
                async with place.client() as client:
                    await client.hello(task)
                    await (client.socket.send_str(data) if isinstance(data, str) else client.socket.send_bytes(data))
                    code, message, closed = await client.end()
                    assert (code, closed) == ("malformed", 1007), name
                    assert wanted in message, name

        await beside(place, model, speech, trouble())
        found = await place.metrics()
        assert found["dualcodec_dropped_total", "malformed"] == len(DATA)
        assert found["dualcodec_streams_now", "roundtrip"] <= 1 and found["dualcodec_streams_now", "encode"] == 0

    play(model, scenario)


def test_too_large(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        async def trouble() -> None:
            async with place.client() as client:
                await client.hello()
                await client.socket.send_bytes(b"P\0" + bytes(9998))  # as long as may be
                await client.socket.send_bytes(b"P\0" + bytes(9999))
                assert await client.end() == ("too_large", "a message must be of at most 10000 bytes", 1009)
            async with place.client() as client:
                await client.socket.send_str(json.dumps({"task": "x" * 10000}))
                assert await client.end() == ("too_large", "a message must be of at most 10000 bytes", 1009)

        await beside(place, model, speech, trouble())
        found = await place.metrics()
        assert found["dualcodec_dropped_total", "too_large"] == found["dualcodec_refused_total", "too_large"] == 1

    play(model, scenario, message_bytes=10000)


def test_a_full_server_says_so(model: dx.DualCodec) -> None:
    async def scenario(place: Place) -> None:
        async with place.client() as first, place.client() as second:
            await first.hello("encode")
            await second.hello("decode")
            async with place.client() as third:
                await third.socket.send_str('{"task": "encode"}')
                code, message, closed = await third.end()
                assert (code, closed) == ("full", 1013) and message == "all 2 streams are taken, try again later"
            await first.socket.close()
            await place.until(lambda: len(place.server._streams.open_ones) == 1)
            async with place.client() as third:
                await third.hello("roundtrip")
                assert (await place.metrics())["dualcodec_streams_now", "roundtrip"] == 1
        assert (await place.metrics())["dualcodec_refused_total", "full"] == 1

    play(model, scenario, streams=2)


def test_who_sends_ahead_waits(model: dx.DualCodec) -> None:
    """What is taken in at once stays within the limit and one message."""

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            await client.hello(max_ahead_s=0.5)
            (stream,) = place.server._streams.open_ones
            put, most_s = stream.put, 0.0

            def watched(*part: Any) -> None:
                nonlocal most_s
                put(*part)
                most_s = max(most_s, stream.in_s)

            stream.put = watched  # type: ignore[method-assign]
            sender = asyncio.create_task(client.send_pcm(np.zeros(10 * RATE_HZ, np.int16), RATE_HZ // 4))
            received = 0
            while received < 2 * 10 * RATE_HZ:
                message = await client.socket.receive()
                received += len(message.data) - 2 if message.data[:1] == b"P" else 0
            await sender
            assert 0.5 < most_s <= 0.5 + 0.25

    play(model, scenario)


def test_a_client_that_vanishes_frees_its_slot(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        for _ in range(3):
            async with place.client() as client:
                await client.hello()
                await client.send_pcm(speech, 5000)
                assert client.socket._response.connection is not None
                client.socket._response.connection.transport.abort()
            await place.until(lambda: not place.server._streams.open_ones)
        async with place.client() as client:  # nothing is left of them
            await client.hello()
            await client.send_pcm(speech, 5000)
            await client.flush()
            assert np.array_equal((await client.clip()).codes, offline(model, speech))

    play(model, scenario, streams=1)
