"""`dualcodec-ext stream`: the samples of whole clips, from and to files and pipes, and one line for what goes wrong."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from serving import CODEBOOKS, HOP, RATE_HZ, check_pcm, decoded, offline, voice

import dualcodec_ext as dx
from dualcodec_ext import cli
from dualcodec_ext._cli.interrupt import FirstInterrupt
from dualcodec_ext._cli.live import Latency
from dualcodec_ext.audio import read_audio, resample

PROGRAM = [sys.executable, "-m", "dualcodec_ext", "stream"]
SUMMARY = (
    r"(\d+) samples in, (\d+) out, [\d.e+]+x real time; latency of (\d+) frames of 20 ms: "
    r"p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms\n"
)


@pytest.fixture(scope="module")
def model() -> dx.DualCodec:
    return dx.DualCodec.from_pretrained("tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main(["stream", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def wanted(model: dx.DualCodec, pcm: np.ndarray[Any, Any], codebooks: int = CODEBOOKS) -> np.ndarray[Any, Any]:
    return decoded(model, offline(model, pcm)[:, :codebooks])[: len(pcm)]


@pytest.mark.parametrize(("piece_ms", "codebooks"), [(20.0, 10), (0.05, 10), (333.0, 1), (7.7, 4)])
def test_raw_files(model: dx.DualCodec, tmp_path: Path, capsys: Any, piece_ms: float, codebooks: int) -> None:
    pcm = voice()[: HOP if piece_ms < 1 else None]
    source, target = tmp_path / "in.raw", tmp_path / "out.raw"
    pcm.astype("<i2").tofile(source)
    options = ("--piece-ms", piece_ms, "--codebooks", codebooks)
    code, out, err = run(capsys, "--in", source, "--out", target, *options)
    assert (code, out) == (0, "")
    found = re.fullmatch(SUMMARY, err)
    assert found and [int(g) for g in found.groups()] == [len(pcm), len(pcm), -(-len(pcm) // HOP)]
    check_pcm(np.fromfile(target, "<i2"), wanted(model, pcm, codebooks))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.raw", "out.raw"]


def test_audio_files_at_another_rate_and_floats(model: dx.DualCodec, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in.flac"
    stereo = np.stack([voice(), voice() // 2], 1)
    soundfile.write(source, stereo, 16000)
    samples = resample(read_audio(source).samples, 16000, RATE_HZ)
    assert run(capsys, "--in", source, "--out", tmp_path / "out.wav", "--piece-ms", 33)[0] == 0
    assert run(capsys, "--in", source, "--out", tmp_path / "out.f32", "--format", "f32le")[0] == 0
    semantic, acoustic = model.encode(torch.from_numpy(samples)[None, None])
    wave = model.decode_from_codes(semantic, acoustic)[0, 0, : len(samples)].double().numpy()
    floats = np.fromfile(tmp_path / "out.f32", "<f4")
    assert floats.shape == wave.shape and np.abs(floats - wave).max() <= 2e-5
    assert soundfile.info(tmp_path / "out.wav").samplerate == RATE_HZ
    check_pcm(soundfile.read(tmp_path / "out.wav", dtype="int16")[0], np.clip(32768 * wave, -32768, 32767))
    # Floats in give what the same samples in 16 bits give.
    (voice() / np.float32(32768)).astype("<f4").tofile(tmp_path / "in.f32")
    assert run(capsys, "--in", tmp_path / "in.f32", "--out", tmp_path / "again.f32", "--format", "f32le")[0] == 0
    check_pcm(32768 * np.fromfile(tmp_path / "again.f32", "<f4").astype(np.float64), wanted(model, voice()))


def test_pipes(model: dx.DualCodec) -> None:
    pcm = voice()
    done = subprocess.run([*PROGRAM, "--in", "-", "--out", "-"], input=pcm.tobytes() + b"x", capture_output=True)
    assert done.returncode == 0
    check_pcm(np.frombuffer(done.stdout, "<i2"), wanted(model, pcm))
    note = "stdin ended within a sample: its last 1 byte(s) were left out\n"
    assert re.fullmatch(note.replace("(s)", r"\(s\)") + SUMMARY, done.stderr.decode())


def test_samples_leave_before_the_end(model: dx.DualCodec) -> None:
    """A frame's samples come back once it is in, while the input is still open, and pieces may end within a sample."""
    pcm, first = voice(), 10 * HOP
    with subprocess.Popen(
        [*PROGRAM, "--in", "-", "--out", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        data = pcm.tobytes()
        process.stdin.write(data[: 2 * first + 1])
        process.stdin.flush()
        early = process.stdout.read(2 * first)
        process.stdin.write(data[2 * first + 1 :])
        process.stdin.close()
        rest = process.stdout.read()
    assert process.returncode == 0
    check_pcm(np.frombuffer(early + rest, "<i2"), wanted(model, pcm))


def test_a_fifo_is_written_as_it_comes(model: dx.DualCodec, tmp_path: Path, capsys: Any) -> None:
    fifo, heard = tmp_path / "fifo", bytearray()
    os.mkfifo(fifo)
    (tmp_path / "in.raw").write_bytes(voice().tobytes())

    def read() -> None:
        with open(fifo, "rb") as file:
            heard.extend(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    assert run(capsys, "--in", tmp_path / "in.raw", "--out", fifo)[0] == 0
    reader.join()
    check_pcm(np.frombuffer(bytes(heard), "<i2"), wanted(model, voice()))


def test_a_reader_that_goes_ends_it_quietly() -> None:
    with subprocess.Popen(
        [*PROGRAM, "--in", "-", "--out", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(voice().tobytes())
        process.stdin.flush()
        assert len(process.stdout.read(2 * HOP)) == 2 * HOP
        process.stdout.close()
        try:
            while True:
                process.stdin.write(voice().tobytes())
        except BrokenPipeError:
            pass
        assert process.wait(timeout=120) == 141
        assert process.stderr.read() == b""
        process.stdin = None  # it has gone, and closing it would try to write what is buffered


def test_paced_takes_as_long_as_the_audio(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only sleeping moves, so that no real time passes."""
    from dualcodec_ext._cli import live

    now_s = 0.0

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now_s

        @staticmethod
        def sleep(seconds: float) -> None:
            nonlocal now_s
            now_s += seconds

    monkeypatch.setattr(live, "time", Clock)
    pcm = voice()[: 50 * HOP]
    pcm.tofile(tmp_path / "in.raw")
    for paced, elapsed_s in (("--paced", 1.0), ("--json", 0.0)):
        begun_s = now_s
        code, _, err = run(capsys, "--in", tmp_path / "in.raw", "--out", tmp_path / "o.raw", "--json", paced)
        facts = json.loads(err)
        assert code == 0 and now_s - begun_s == pytest.approx(elapsed_s)
        assert facts["elapsed_s"] == pytest.approx(elapsed_s) and facts["frames"] == 50
        assert facts["p50_ms"] == facts["p99_ms"] == 0 and facts["lookahead_ms"] == 0


def test_latency_counts_from_the_last_sample_in_to_the_last_one_out() -> None:
    latency = Latency(10)
    latency.came(15, 1.0)
    latency.left(5, 1.1)
    assert latency.percentiles_ms() == {}
    latency.came(10, 2.0)
    latency.left(10, 2.5)
    assert latency.seconds == [1.5]
    latency.ended(3.0)
    latency.left(10, 3.25)
    assert latency.seconds == [1.5, 1.25, 0.25]
    assert latency.percentiles_ms() == pytest.approx({"p50_ms": 1250, "p95_ms": 1475, "p99_ms": 1495})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--in", "nothing.wav"], "cannot read nothing.wav: no such file or directory"),
        (["--in", "nothing.raw"], "cannot read nothing.raw: no such file or directory"),
        (["--in", "empty.raw"], "empty.raw: holds no audio samples"),
        (["--in", "empty.wav"], "empty.wav: is an empty file"),
        (["--in", "one.raw"], "one.raw: holds no audio samples"),
        (["--in", "nan.f32", "--format", "f32le"], "nan.f32: sample 3 is not a finite number"),
        (["--in", "ok.raw", "--piece-ms", "0"], "--piece-ms must be a sample's time or more, got 0"),
        (["--in", "ok.raw", "--piece-ms", "nan"], "--piece-ms must be a sample's time or more, got nan"),
        (["--in", "ok.raw", "--codebooks", "11"], "--codebooks must be 1 to 10 for tiny, got 11"),
        (
            ["--in", "ok.raw", "--model", "12hz_stream"],
            "12hz_stream computes no features of its own: ",
        ),
        (["--in", "ok.raw", "--out", "no/o.raw"], "cannot write no/o.raw: no such file or directory"),
        (["--in", "ok.raw", "--out", "ok.raw"], "--out: ok.raw: is the input as well"),
        (["--in", "ok.raw", "--out", "link.raw"], "--out: link.raw: is the input as well"),
        (["--in", "ok.raw", "--out", "hard.raw"], "--out: hard.raw: is the input as well"),
        (["--in", "ok.raw", "--out", "o.xyz"], "o.xyz: audio is written as one of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refusals(
    arguments: list[str], text: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("empty.raw", b""), ("empty.wav", b""), ("one.raw", b"1"), ("ok.raw", bytes(2000))):
        Path(name).write_bytes(data)
    np.array([0, 0, 0, np.nan], "<f4").tofile("nan.f32")
    os.symlink("ok.raw", "link.raw")
    os.link("ok.raw", "hard.raw")
    before = sorted(os.listdir())
    code, out, err = run(capsys, *([] if "--out" in arguments else ["--out", "out.raw"]), *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("untrained")]
    assert (code, out, len(lines)) == (2, "", 1) and lines[0].startswith(f"dualcodec-ext: error: {text}"), err
    assert sorted(os.listdir()) == before


def test_stdin_from_the_output_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.raw"
    voice().tofile(source)
    with open(source, "rb") as file:
        done = subprocess.run([*PROGRAM, "--in", "-", "--out", str(source)], stdin=file, capture_output=True)
    assert done.returncode == 2 and b"is the input as well" in done.stderr
    assert source.read_bytes() == voice().tobytes()


def started(source: str, target: Path, *more: str, **options: Any) -> subprocess.Popen[bytes]:
    """A stream that is at work: its temporary file is there."""
    command = [*PROGRAM, "--in", source, "--out", str(target), *more]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell runs in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=heard, **options)
    deadline = time.monotonic() + 120
    while not list(target.parent.glob(".dualcodec-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it must still be at work"
    return process


def test_ctrl_c_ends_a_live_recording(model: dx.DualCodec, tmp_path: Path) -> None:
    pcm = voice()
    with started("-", tmp_path / "out.raw", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(pcm.tobytes())
        process.stdin.flush()
        while unread(process.stdin):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # and stdin stays open
        assert process.wait(120) == 0
        assert re.fullmatch(SUMMARY, process.stderr.read().decode())
    check_pcm(np.fromfile(tmp_path / "out.raw", "<i2"), wanted(model, pcm))
    assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]


def unread(pipe: Any) -> int:
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


@pytest.mark.parametrize(
    ("stop", "live", "code", "word"),
    [
        (signal.SIGINT, False, 130, "interrupted"),
        (signal.SIGTERM, False, 143, "terminated"),
        (signal.SIGTERM, True, 143, "terminated"),
    ],
    ids=["SIGINT-file", "SIGTERM-file", "SIGTERM-live"],
)
def test_what_is_given_up_is_told(stop: signal.Signals, live: bool, code: int, word: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.raw", tmp_path / "out.wav"
    np.zeros(RATE_HZ * 600, "<i2").tofile(source)
    where = "-" if live else str(source)
    with started(where, target, "--paced", stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.send_signal(stop)
        assert process.wait(120) == code
        text = process.stderr.read().decode().strip()
    assert text == f"dualcodec-ext: error: {word}, nothing was written to {target}"
    assert [path.name for path in tmp_path.iterdir()] == ["in.raw"]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: shells start what runs in the background with it turned off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_gives_up(capsys: Any) -> None:
    with FirstInterrupt() as interrupt:
        read, write = os.pipe()
        os.write(write, b"1")
        assert interrupt.wait(read)
        signal.raise_signal(signal.SIGINT)
        assert not interrupt.wait(read)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    os.close(read)
    os.close(write)
