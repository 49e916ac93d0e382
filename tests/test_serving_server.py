"""The server of `dualcodec-ext serve` itself: failures, its end, metrics, addresses, and where it listens."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from serving import HOP, RATE_HZ, Client, Place, check_pcm, decoded, offline, play
from test_serving import model, speech

import dualcodec_ext as dx
from dualcodec_ext import cli
from dualcodec_ext.serving import ServeOptions, Server

__all__ = ["model", "speech"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_failing_step_ends_its_streams_alone(
    model: dx.DualCodec, speech: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(place: Place) -> None:
        stage = place.server._streams._decoder.stage
        run = stage.run

        def fail(*_: Any) -> Any:
            raise RuntimeError("no\nluck")

        async with place.client() as client, place.client() as encoder:
            await client.hello()
            await encoder.hello("encode")
            stage.run = fail  # type: ignore[method-assign]
            await client.send_pcm(speech, 5000)
            assert await client.end() == ("internal", "RuntimeError: no luck", 1011)
            stage.run = run  # type: ignore[method-assign]
            await encoder.send_pcm(speech, 5000)
            await encoder.flush()
            assert np.array_equal((await encoder.clip()).codes, offline(model, speech))
        async with place.client() as client:
            await client.hello()
            await client.send_pcm(speech, 5000)
            await client.flush()
            check_pcm((await client.clip()).pcm, decoded(model, offline(model, speech)))
        assert (await place.metrics())["dualcodec_dropped_total", "internal"] == 1

    play(model, scenario)
    assert "a step failed" in caplog.text


def test_a_pong_does_not_wait_for_the_model(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        stage = place.server._streams._decoder.stage
        run, go_on = stage.run, threading.Event()

        def wait(*arguments: Any) -> Any:
            go_on.wait()
            return run(*arguments)

        stage.run = wait  # type: ignore[method-assign]
        try:
            async with place.client() as client:
                await client.hello("decode")
                await client.send_codes(offline(model, speech), 20)
                await client.flush()
                await client.socket.send_str('{"type": "ping", "id": 7}')
                assert await client.text() == {"type": "pong", "id": 7}
                go_on.set()
                assert (await client.clip()).flushed["samples"] == -(-len(speech) // HOP) * HOP
        finally:
            go_on.set()

    play(model, scenario)


def test_stopping_serves_what_was_taken_in(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        async with place.client() as client, place.client() as waiting:
            await client.hello()
            await client.send_pcm(speech, len(speech))
            (stream,) = place.server._streams.open_ones
            await place.until(lambda: bool(stream._clips))
            stopping = asyncio.create_task(place.server.stop())
            received = 0
            while (message := await client.socket.receive()).type.name == "BINARY":
                received += (len(message.data) - 2) // 2 if message.data[:1] == b"P" else 0
            assert received == len(speech) // HOP * HOP
            assert json.loads(message.data)["code"] == "shutdown"
            await client.socket.receive()
            assert client.socket.close_code == 1013
            assert (await waiting.end())[::2] == ("shutdown", 1013)
            with pytest.raises(OSError):
                async with place.client():
                    pass
            await stopping

    play(model, scenario, grace_s=60.0)


def test_metrics(model: dx.DualCodec, speech: np.ndarray[Any, Any]) -> None:
    async def scenario(place: Place) -> None:
        frames = -(-len(speech) // HOP)
        async with place.client() as client:
            await client.hello()
            for _ in range(2):
                await client.send_pcm(speech, 5000)
                await client.flush()
            assert (await place.metrics())["dualcodec_streams_now", "roundtrip"] == 1
            for _ in range(2):
                await client.clip()
            found = await place.metrics()
        for direction in ("encode", "decode"):
            assert found["dualcodec_frames_total", direction] == 2 * frames
            assert found["dualcodec_audio_seconds_total", direction] == pytest.approx(2 * frames * HOP / RATE_HZ)
            steps = found["dualcodec_step_seconds_count", direction]
            assert 2 * frames / 4 <= steps <= 2 * frames and found["dualcodec_step_slots_sum", direction] == steps
            seconds = found["dualcodec_step_seconds_sum", direction]
            assert found["dualcodec_real_time_factor", direction] == pytest.approx(2 * frames * HOP / RATE_HZ / seconds)
        assert found["dualcodec_time_to_first_audio_seconds_count", "roundtrip"] == 2
        assert found["dualcodec_queue_seconds", "in"] == found["dualcodec_queue_seconds", "out"] == 0
        await place.until(lambda: not place.server._streams.open_ones)
        found = await place.metrics()
        assert found["dualcodec_streams_now", "roundtrip"] == 0 and found["dualcodec_streams_total", "roundtrip"] == 1
        assert not [key for key, value in found.items() if key[0] in _ENDS and value]

    play(model, scenario)


_ENDS = ("dualcodec_dropped_total", "dualcodec_refused_total")


def test_addresses(model: dx.DualCodec) -> None:
    async def scenario(place: Place) -> None:
        assert place.server._runner.addresses[0][0] == "127.0.0.1"
        assert (await place.get("/healthz"))[:2] == (200, "ok\n")
        status, text, headers = await place.get("/v1/info")
        async with place.client() as client:
            assert status == 200 and json.loads(text) == (await client.hello())["model"]
        assert json.loads(text) == {
            "name": "tiny",
            "sample_rate": RATE_HZ,
            "hop_samples": HOP,
            "frame_rate": 50.0,
            "codebook_sizes": [2048, *[1024] * 9],
            "lookahead_frames": 0,
            "latency_ms": 0.0,
            "tasks": ["roundtrip", "encode", "decode"],
        }
        for path in ("/", "/static/index.html"):
            status, text, headers = await place.get(path)
            assert (
                status == 200 and "<!doctype html>" in text.lower() and headers["Content-Type"].startswith("text/html")
            )
            assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert (await place.get("/metrics"))[2]["Content-Type"].startswith("text/plain; version=")
        for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/nothing"):
            assert (await place.get(path))[0] in (403, 404)
        status, text, headers = await place.get("/v1/stream")
        assert (status, headers["Upgrade"]) == (426, "websocket")
        assert text == "this address takes WebSocket connections: see docs/serving.md\n"

    play(model, scenario)


def test_pages_of_other_sites(model: dx.DualCodec) -> None:
    async def scenario(place: Place) -> None:
        for origin in (place.server.url.rstrip("/"), "https://friend.example"):
            async with place.client(headers={"Origin": origin}) as client:
                await client.hello()
        port = place.server.port
        async with place.client(headers={"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"}) as client:
            await client.hello()
        rebound = f"evil.example:{port}"
        for origin, host in (
            ("https://other.example", None),
            ("null", None),
            ("http://[", None),
            ("http://127.0.0.1:1", None),
            (f"http://{rebound}", rebound),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
                async with place.client(headers={"Origin": origin} | ({"Host": host} if host else {})):
                    pass
            assert raised.value.status == 403, origin

    play(model, scenario, origins=("https://friend.example",))


def test_too_many_connections(model: dx.DualCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualcodec_ext._serving import app

    monkeypatch.setattr(app, "_SPARE_CONNECTIONS", 1)

    async def scenario(place: Place) -> None:
        async with place.client(), place.client():
            with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
                async with place.client():
                    pass
            assert raised.value.status == 503
            assert (await place.metrics())["dualcodec_refused_total", "full"] == 1

    play(model, scenario, streams=1)


def test_each_stream_is_logged(
    model: dx.DualCodec, speech: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dualcodec_ext")

    async def scenario(place: Place) -> None:
        async with place.client() as client:
            await client.hello("encode", codebooks=3)
            async with place.client() as other:
                await other.socket.send_str('{"task": "encode"}')
                assert (await other.end())[1] == "the one stream is taken, try again later"
        await place.until(lambda: not place.server._streams.open_ones)
        async with place.client() as client:
            await client.hello()
            await client.socket.send_str("nonsense\n")
            await client.end()

    play(model, scenario, streams=1)
    lines = [record.getMessage() for record in caplog.records if record.name == "dualcodec_ext._serving.app"]
    wanted = [
        "stream 1: encode opened, 3 codebooks",
        "stream refused, full: the one stream is taken, try again later",
        r"stream 1: encode ended after \d+\.\d s, closed by the client",
        "stream 2: roundtrip opened, 10 codebooks",
        r'stream 2: roundtrip ended after \d+\.\d s, malformed: a text message must be .*, got "nonsense\\n"',
    ]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def test_it_listens_to_this_machine_alone_by_default() -> None:
    assert ServeOptions().host == "127.0.0.1"
    assert inspect.signature(cli.serve).parameters["host"].default == "127.0.0.1"


def test_a_port_that_is_taken(model: dx.DualCodec) -> None:
    async def scenario(place: Place) -> None:
        other = Server(model, options=ServeOptions(port=place.server.port, streams=1))
        taken = rf"^cannot listen on 127\.0\.0\.1 port {place.server.port}: \S.*in use"
        with pytest.raises(dx.DualCodecError, match=taken):
            await other.start()
        with pytest.raises(dx.DualCodecError, match=r"^cannot listen on no such host port 0: "):
            await Server(model, options=ServeOptions(host="no such host", port=0, streams=1)).start()

    play(model, scenario, streams=1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"streams": 0}, "streams must be a whole number from 1 to 1024, got 0"),
        ({"port": 65536}, "port must be a whole number from 0 to 65535, got 65536"),
        ({"port": True}, "port must be a whole number"),
        ({"message_bytes": 1.5}, "message_bytes must be a whole number from 16"),
        ({"ahead_s": 0}, "ahead_s must be a number above 0, got 0"),
        ({"idle_s": math.nan}, "idle_s must be a number above 0, got nan"),
        ({"stall_s": math.inf}, "stall_s must be a number above 0, got inf"),
        *(
            ({"origins": ("https://a.example", wrong)}, "an allowed origin must be like https://example.org, got '?")
            for wrong in ("foo", "a.example:80", "https://a.example/", "https://A.example", "ftp://a", "https://[", 3)
        ),
    ],
    ids=str,
)
def test_wrong_options(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(dx.DualCodecError, match=f"^serve: {text}"):
        ServeOptions(**wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_the_command_ends_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    verbose = ["-v"] if number == signal.SIGTERM else []
    command = [sys.executable, "-m", "dualcodec_ext", "serve", "--port", "0", "--streams", "2", *verbose]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", line)
        assert found, line + process.stderr.read()

        async def scenario() -> None:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"http://127.0.0.1:{found[1]}/v1/stream") as socket,
            ):
                client = Client(socket)
                await client.hello()
                process.send_signal(number)
                assert (await client.end())[::2] == ("shutdown", 1013)

        asyncio.run(scenario())
        assert process.wait(timeout=120) == 0
        opened, ended = r"[-\d]+ [:,\d]+ stream 1: roundtrip opened, .*\n", r"[-\d: ,]+ stream 1: roundtrip ended .*\n"
        told = process.stderr.read()
        assert re.fullmatch(opened + ended if verbose else "", told) and "127.0.0.1" not in told, told


def test_without_aiohttp_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "aiohttp" else find(name, *a))
    assert cli.main(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err == "dualcodec-ext: error: serve needs aiohttp: pip install 'dualcodec-ext[serve]'\n"


def test_importing_the_module_needs_torch_alone() -> None:
    program = "import sys, dualcodec_ext.serving; print({'aiohttp', 'prometheus_client'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_model_that_cannot_stream_says_why(model: dx.DualCodec) -> None:
    training = dx.DualCodec.from_pretrained("tiny").train()
    with pytest.raises(dx.DualCodecError, match="must be in eval mode"):
        Server(training)
