"""`python -m bench serve`: many clients in real time against `dualcodec-ext serve` in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dualcodec_ext as dx
from dualcodec_ext import testing

from . import apart
from .timing import percentile

_TASKS = ("roundtrip", "decode")
_POINTS = (50, 95, 99)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench serve",
        description="Clients that send tiny's audio or codes in real time, and play what comes back: the time to first "
        "audio, from a clip's first data sent to its first audio received; the latency of every message of audio, from "
        "the piece that completed it; and underruns of a playback that begins with --preroll-ms in its buffer.",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tasks", nargs="+", choices=_TASKS, default=list(_TASKS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio per client (10)")
    parser.add_argument("--clip-s", type=float, default=1.0, help="a flush ends a clip after so many seconds (1)")
    parser.add_argument("--piece-ms", type=float, default=20.0, help="audio in a message (20), whole frames")
    parser.add_argument("--preroll-ms", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=1, help="of a step of the server's (1)")
    parser.add_argument("--json", metavar="F", help="write everything")
    parser.add_argument("--markdown", metavar="F", help="write what is printed")
    args = parser.parse_args(argv)
    for name in ("seconds", "clip_s", "piece_ms", "preroll_ms"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if min(args.clients) < 1 or args.threads < 1:
        parser.error("--clients and --threads must be at least 1")
    return args


@dataclass
class Heard:
    """What one client found."""

    first_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    underruns: int = 0
    clips_with_underruns: int = 0
    clips: int = 0
    samples: int = 0


class Playback:
    """A buffer that plays once `preroll` samples are in it, and begins anew where it ran empty.

    Args:
        preroll: samples.
        rate_hz: of the audio.
    """

    def __init__(self, preroll: int, rate_hz: int) -> None:
        self._preroll, self._rate_hz = preroll, rate_hz
        self._held = 0  # samples of this stretch of playing, played or not
        self._since_s: float | None = None
        self.underruns = 0

    def add(self, samples: int, now_s: float) -> None:
        """Samples came."""
        if self._since_s is not None and now_s > self._since_s + self._held / self._rate_hz:
            self.underruns += 1
            self._held, self._since_s = 0, None
        self._held += samples
        if self._since_s is None and self._held >= self._preroll:
            self._since_s = now_s


@dataclass(frozen=True)
class Plan:
    """What every client does."""

    task: str
    url: str
    messages: list[bytes]  # one clip's
    piece_frames: int
    hop_samples: int
    rate_hz: int
    clips: int
    preroll: int


async def _client(session: Any, plan: Plan, all_there: asyncio.Barrier, after_s: float) -> Heard:
    """Sends clips one behind the other without a pause, each piece when its last sample would have been spoken."""
    heard, piece_s = Heard(), plan.piece_frames * plan.hop_samples / plan.rate_hz
    async with session.ws_connect(plan.url) as socket:
        await socket.send_str(json.dumps({"task": plan.task}))
        ready = json.loads((await socket.receive()).data)
        if ready["type"] != "ready":
            raise RuntimeError(f"the server refused: {ready}")
        await all_there.wait()
        start_s = time.perf_counter() + after_s
        sent_s: list[list[float]] = []

        async def send() -> None:
            at = 0
            for _ in range(plan.clips):
                sent_s.append([])
                for message in plan.messages:
                    at += 1
                    await asyncio.sleep(start_s + at * piece_s - time.perf_counter())
                    sent_s[-1].append(time.perf_counter())
                    await socket.send_bytes(message)
                await socket.send_str('{"type": "flush"}')

        sender = asyncio.create_task(send())
        for clip in range(plan.clips):
            playback, samples = Playback(plan.preroll, plan.rate_hz), 0
            while True:
                message = await socket.receive()
                if isinstance(message.data, str):
                    told = json.loads(message.data)
                    if told["type"] != "flushed":
                        raise RuntimeError(f"the server said: {told}")
                    break
                if not isinstance(message.data, bytes):
                    raise RuntimeError(f"the connection ended: {message}")
                if message.data[:1] != b"P":
                    continue
                now_s, count = time.perf_counter(), (len(message.data) - 2) // 2
                if not samples:
                    heard.first_s.append(now_s - sent_s[clip][0])
                samples += count
                piece = (samples // plan.hop_samples - 1) // plan.piece_frames
                heard.latency_s.append(now_s - sent_s[clip][piece])
                playback.add(count, now_s)
            heard.underruns += playback.underruns
            heard.clips_with_underruns += playback.underruns > 0
            heard.clips += 1
            heard.samples += samples
        await sender
    return heard


async def _play(plan: Plan, clients: int) -> list[Heard]:
    import aiohttp

    chance = random.Random(clients)  # once connected, clients begin when they like
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        all_there = asyncio.Barrier(clients)
        return await asyncio.gather(
            *(_client(session, plan, all_there, 0.2 + 0.5 * chance.random()) for _ in range(clients))
        )


@contextmanager
def served(clients: int, threads: int) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: its process id, and its address."""
    command = [sys.executable, "-m", "dualcodec_ext", "serve", "--port", "0"]
    command += ["--streams", str(clients), "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+/", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line}")
        try:
            yield process.pid, found[0]
        finally:
            process.terminate()
            process.wait(30)


def cpu_s(process: int) -> float:
    """CPU time that a process has taken (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """CPU time that all processes of this machine have taken (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def make_clips(
    args: argparse.Namespace, model: dx.DualCodec
) -> tuple[dict[str, list[bytes]], int, np.ndarray[Any, Any]]:
    """The messages of a clip of each task, the frames of each, and the codes that they stand for."""
    hop, rate_hz = model.dac.hop_length, model.settings["sample_rate"]
    piece = max(1, round(args.piece_ms * rate_hz / 1e3 / hop))
    pieces = max(1, round(args.clip_s * rate_hz / hop / piece))
    pcm = (testing.make_speech(pieces * piece * hop)[0, 0] * 32767).round().to(torch.int16).numpy()
    semantic, acoustic = model.encode(torch.from_numpy(pcm.astype(np.float32) / 32768)[None, None])
    assert acoustic is not None
    codes = torch.cat([semantic, acoustic], 1)[0].T.numpy()
    spans = [(at * piece, (at + 1) * piece) for at in range(pieces)]
    return (
        {
            "roundtrip": [b"P\0" + pcm[a * hop : b * hop].astype("<i2").tobytes() for a, b in spans],
            "decode": [b"C\0" + codes[a:b].astype("<u2").tobytes() for a, b in spans],
        },
        piece,
        codes,
    )


async def check(url: str, messages: Mapping[str, list[bytes]], codes: np.ndarray[Any, Any]) -> None:
    """Refuse to time a server that gives other codes than the whole clip has, or other audio for them."""
    import aiohttp

    found: dict[str, bytes] = {}
    async with aiohttp.ClientSession() as session:
        for task in _TASKS:
            async with session.ws_connect(url) as socket:
                await socket.send_str(json.dumps({"task": task}))
                await socket.receive()
                for message in messages[task]:
                    await socket.send_bytes(message)
                await socket.send_str('{"type": "flush"}')
                parts = {b"C": b"", b"P": b""}
                while isinstance((message := (await socket.receive()).data), bytes):
                    parts[message[:1]] += message[2:]
                found[task] = parts[b"P"]
                if task == "roundtrip" and not np.array_equal(np.frombuffer(parts[b"C"], "<u2"), codes.ravel()):
                    raise RuntimeError("the server's codes are not those of the whole clip")
    if not found["decode"] or found["decode"] != found["roundtrip"]:
        raise RuntimeError("the server's audio depends on the task")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = dx.DualCodec.from_pretrained("tiny").eval()
    hop, rate_hz = model.dac.hop_length, model.settings["sample_rate"]
    messages, piece, codes = make_clips(args, model)
    cases = []
    gc.collect()
    gc.freeze()  # or full collections would look through all of torch, and clients would seem to wait
    with served(max(args.clients), args.threads) as (process, page):
        url = f"{page}v1/stream"
        asyncio.run(check(url, messages, codes))
        for task in args.tasks:
            clip_s = len(messages[task]) * piece * hop / rate_hz
            clips = max(1, round(args.seconds / clip_s))
            preroll = round(args.preroll_ms * rate_hz / 1e3)
            plan = Plan(task, url, messages[task], piece, hop, rate_hz, clips, preroll)
            for clients in args.clients:
                before, own, everyone, begun_s = cpu_s(process), cpu_s(os.getpid()), busy_s(), time.perf_counter()
                heard = asyncio.run(_play(plan, clients))
                elapsed_s = time.perf_counter() - begun_s
                server_cpus, clients_cpus = (
                    (cpu_s(process) - before) / elapsed_s,
                    (cpu_s(os.getpid()) - own) / elapsed_s,
                )
                case = {
                    "task": task,
                    "clients": clients,
                    "clips": sum(h.clips for h in heard),
                    "audio_s": sum(h.samples for h in heard) / rate_hz,
                    "elapsed_s": elapsed_s,
                    "first_s": _points([s for h in heard for s in h.first_s]),
                    "latency_s": _points([s for h in heard for s in h.latency_s]),
                    "underruns": sum(h.underruns for h in heard),
                    "clips_with_underruns": sum(h.clips_with_underruns for h in heard),
                    "clients_with_underruns": sum(h.underruns > 0 for h in heard),
                    "server_cpus": server_cpus,
                    "clients_cpus": clients_cpus,
                    # What else ran on the machine, which a server that falls behind may owe its delay to.
                    "other_cpus": max(0.0, (busy_s() - everyone) / elapsed_s - server_cpus - clients_cpus),
                }
                cases.append(case)
                print(told(case), flush=True)
    return {
        "model": "tiny",
        "threads": args.threads,
        "piece_ms": 1e3 * piece * hop / rate_hz,
        "preroll_ms": args.preroll_ms,
        "clip_s": len(messages["decode"]) * piece * hop / rate_hz,
        "cases": cases,
    }


def _points(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": percentile(values, p) for p in _POINTS} | {"worst": max(values), "count": len(values)}


def told(case: Mapping[str, Any]) -> str:
    """One line of a case."""
    first, latency = (
        " / ".join(f"{1e3 * case[key][f'p{p}']:.1f}" for p in _POINTS) for key in ("first_s", "latency_s")
    )
    return (
        f"{case['task']}, {case['clients']} clients, {case['clips']} clips: first audio {first} ms, latency {latency}"
        f" ms (p50 / p95 / p99), {case['underruns']} underruns of {case['clients_with_underruns']} clients; server"
        f" {100 * case['server_cpus']:.0f} %, clients {100 * case['clients_cpus']:.0f} %, others"
        f" {100 * case['other_cpus']:.0f} % of a core"
    )


def main(argv: Sequence[str]) -> int:
    """Run it; returns 0, or 1 where the compiled module is missing."""
    args = parse(argv)
    if apart.refuse():
        return 1
    torch.set_num_threads(1)
    run = apart.finish(apart.begun("serve", argv) | measure(args), args.json)
    if args.markdown:
        text = "\n".join(told(case) for case in run["cases"])
        Path(args.markdown).write_text(f"{text}\ncommit {run['commit']}\n", encoding="utf-8")
    return 0
