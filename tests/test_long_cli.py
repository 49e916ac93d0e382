"""Long recordings on the command line: in chunks the files of the whole, spans of a decode, nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import SMALL, run, wave

from bench.machine import peak_extra_bytes
from dualcodec_ext._cli import long
from dualcodec_ext._cli.codec import open_codec
from dualcodec_ext._cli.options import ModelOptions
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext.audio import AudioReader
from dualcodec_ext.codes import SUFFIX, map_codes, read_codes, write_codes
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.windows import FeatureWindows

# As SMALL, at another rate than that of the features; and with hardly any channels, for minutes of audio.
SLOWER = SMALL | {"encoder_rates": [4, 5, 4, 4], "decoder_rates": [4, 4, 5, 4], "sample_rate": 16000}
NARROW = SMALL | {"encoder_dim": 2, "decoder_dim": 32, "latent_dim": 16, "convnext_dim": 16, "n_codebooks": 1}
NARROW |= {"encoder_rates": [4, 5, 6, 8, 2], "decoder_rates": [2, 8, 6, 5, 4], "semantic_downsample_factor": 4}
MODELS = {"small": SMALL, "slower": SLOWER, "narrow": NARROW}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODELS[getattr(request, "param", "small")]))
    return str(path)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, vowels("aieo").samples, 24000)
    return path


# Chunks


@pytest.mark.parametrize(
    "name, rate, samples, channels, model",
    [
        ("mono.wav", 24000, 40003, 1, "small"),
        ("stereo.flac", 44100, 70001, 2, "small"),
        ("lossy.mp3", 24000, 50000, 1, "slower"),
        ("slow.wav", 8000, 13001, 1, "slower"),
        ("short.wav", 24000, 700, 1, "small"),
        ("one.wav", 48000, 1, 1, "small"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v else "",
    indirect=["model"],
)
def test_chunks_change_no_file(
    name: str, rate: int, samples: int, channels: int, tmp_path: Path, model: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(long, "_BLOCK_SAMPLES", 9999)
    source = wave(tmp_path / name, rate, samples, channels)
    stem = source.stem
    files: dict[str, list[bytes]] = {}
    for chunk in (0, 30):
        out = tmp_path / f"chunk{chunk}"
        options = ["--chunk-frames", chunk]
        for quantizers in (1, 4):
            codes = out / f"q{quantizers}"
            assert run(capsys, "encode", source, "-o", codes, "--model", model, "-q", quantizers, *options)[0] == 0
        assert run(capsys, "decode", codes, "-o", out, *options)[0] == 0
        assert run(capsys, "decode", codes, "-o", out, *options, "--rate", 44100, "--format", "flac")[0] == 0
        assert run(capsys, "roundtrip", source, out / "back.wav", "--model", model, *options)[0] == 0
        for file in sorted(path for path in out.rglob("*") if path.is_file()):
            files.setdefault(str(file.relative_to(out)), []).append(file.read_bytes())
    assert set(files) == {f"q1/{stem}{SUFFIX}", f"q4/{stem}{SUFFIX}", f"{stem}.wav", f"{stem}.flac", "back.wav"}
    for file, contents in files.items():
        assert len(contents) == 2 and len(set(contents)) == 1, file


def test_past_one_minute_it_goes_in_chunks(speech: Path, model: str, tmp_path: Path, capsys: Any, monkeypatch: Any):
    went: list[str] = []
    for name in ("encode_long", "decode_long"):
        real = getattr(long, name)
        monkeypatch.setattr(f"dualcodec_ext._cli.commands.{name}", lambda *a, r=real, n=name: went.append(n) or r(*a))
    assert run(capsys, "roundtrip", speech, tmp_path / "a.wav", "--model", model)[0] == 0 and not went
    assert long.chunk_for(61, None) == long.CHUNK_FRAMES and long.chunk_for(60, None) is None
    assert long.chunk_for(1e9, 0) is None and long.chunk_for(1, 5) == 5
    monkeypatch.setattr(long, "LONG_S", 1.0)
    assert run(capsys, "roundtrip", speech, tmp_path / "b.wav", "--model", model)[0] == 0
    assert went == ["encode_long", "decode_long"]
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_wrong_chunk_is_one_line(speech: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "encode", speech, "-o", tmp_path / "out", "--model", model, "--chunk-frames", -1)
    assert code == 2 and "chunk-frames" in err and len(err.splitlines()) == 1


def test_the_progress_bar(speech: Path, model: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    options = ("--model", model, "--chunk-frames", 20)
    code, _, err = run(capsys, "roundtrip", speech, tmp_path / "a.wav", *options)
    assert code == 0 and "encode: 100%" in err and "decode: 100%" in err and "/2 s [" in err
    code, out, err = run(capsys, "roundtrip", speech, tmp_path / "a.wav", "--json", *options)
    assert code == 0 and "%" not in err and json.loads(out)["ok"]


# Spans


@pytest.mark.parametrize("options", [[], ["--fast"]], ids=["exact", "fast"])
def test_a_span_is_that_of_the_whole(options: list[str], speech: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    codes = tmp_path / f"speech{SUFFIX}"
    assert run(capsys, "encode", speech, "-o", tmp_path, "--model", model)[0] == 0
    assert run(capsys, "decode", codes, "-o", tmp_path / "whole", *options)[0] == 0
    whole = soundfile.read(tmp_path / "whole" / "speech.wav", dtype="int16")[0]
    for begin, end in ((0.5, 0.75), (0, 0.01), (1.3, 1.6), (0.1, None), (None, 1.0)):
        asked = [*(["--from", begin] if begin is not None else []), *(["--to", end] if end is not None else [])]
        code, out, err = run(capsys, "decode", codes, "-o", tmp_path / "part", *asked, *options)
        assert code == 0, err
        part = soundfile.read(tmp_path / "part" / "speech.wav", dtype="int16")[0]
        np.testing.assert_array_equal(part, whole[round((begin or 0) * 24000) : round((end or 1.6) * 24000)])
        assert f"from {begin or 0:g} s" in out


def test_a_span_at_another_rate(speech: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    codes = tmp_path / f"speech{SUFFIX}"
    run(capsys, "encode", speech, "-o", tmp_path, "--model", model)
    options = ["--rate", 44100, "--format", "flac"]
    assert run(capsys, "decode", codes, "-o", tmp_path / "whole", *options)[0] == 0
    assert run(capsys, "decode", codes, "-o", tmp_path / "part", *options, "--from", 1.2, "--to", 1.5)[0] == 0
    whole, part = (soundfile.read(tmp_path / name / "speech.flac", dtype="int16")[0] for name in ("whole", "part"))
    assert len(part) == round(0.3 * 44100)
    assert np.abs(part.astype(int) - whole[round(1.2 * 44100) : round(1.5 * 44100)]).max() <= 1


def test_a_span_reads_what_it_needs(speech: Path, model: str, tmp_path: Path, capsys: Any) -> None:
    """Codes that no codebook has, but for those that the span depends on."""
    codes = tmp_path / f"speech{SUFFIX}"
    run(capsys, "encode", speech, "-o", tmp_path, "--model", model)
    run(capsys, "decode", codes, "-o", tmp_path / "whole", "--from", 0.9, "--to", 1.0)
    made = read_codes(codes)
    codec = open_codec(ModelOptions(model=model), None)
    first, last = codec.model.span_frames(round(0.9 * 24000), 24000, made.frames)
    assert 0 < first < last < made.frames
    data = bytearray(codes.read_bytes())
    at = len(data) - 2 * made.frames  # the semantic codes come last
    for frame in (*range(first), *range(last, made.frames)):
        data[at + 2 * frame : at + 2 * frame + 2] = b"\xff\xff"
    codes.write_bytes(data)
    assert run(capsys, "decode", codes, "-o", tmp_path / "part", "--from", 0.9, "--to", 1.0)[0] == 0
    assert (tmp_path / "part" / "speech.wav").read_bytes() == (tmp_path / "whole" / "speech.wav").read_bytes()
    code, _, err = run(capsys, "decode", codes, "-o", tmp_path / "other", "--from", 0, "--to", 1.0)
    assert code == 2 and "semantic code 65535 at codebook 0, frame" in err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "asked, text",
    [
        (["--from", 1, "--to", 0.5], "--from must lie before --to, got 1 and 0.5"),
        (["--from", 1.6], "--from must lie before the end, 1.6 s, got 1.6"),
        (["--from", 100], "--from must lie before the end, 1.6 s, got 100"),
        (["--to", 20], "--to must be at most 1.6, the recording's seconds, got 20"),
        (["--from", 1, "--to", 1.00001], "are the same sample at 24000 Hz"),
        (["--from", -1], "--from"),
        (["--from", "nan"], "--from"),
    ],
)
def test_a_wrong_span_is_one_line(
    asked: list[Any], text: str, speech: Path, model: str, tmp_path: Path, capsys: Any
) -> None:
    run(capsys, "encode", speech, "-o", tmp_path, "--model", model)
    code, _, err = run(capsys, "decode", tmp_path / f"speech{SUFFIX}", "-o", tmp_path / "out", *asked)
    lines = [line for line in err.splitlines() if "untrained" not in line]
    assert code == 2 and text in err and len(lines) == 1 and not (tmp_path / "out").exists()


# Nothing half-written


@pytest.mark.parametrize("command", ["encode", "decode", "roundtrip"])
def test_what_is_interrupted_leaves_nothing(
    command: str, speech: Path, model: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    codes, out = tmp_path / f"speech{SUFFIX}", tmp_path / "out"
    run(capsys, "encode", speech, "-o", tmp_path, "--model", model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(real: Any) -> Any:
        def pieces(*arguments: Any) -> Any:
            yield next(iter(real(*arguments)))
            raise KeyboardInterrupt

        return pieces

    monkeypatch.setattr(long, "_BLOCK_SAMPLES", 5000)
    if command == "encode":
        monkeypatch.setattr(AudioReader, "blocks", broken(AudioReader.blocks))
    else:
        monkeypatch.setattr("dualcodec_ext._cli.commands.decode_long", broken(long.decode_long))
    arguments = {
        "encode": ["encode", speech, "-o", out, "--model", model],
        "decode": ["decode", codes, "-o", out],
        "roundtrip": ["roundtrip", speech, tmp_path / "new.wav", "--model", model],
    }[command]
    assert run(capsys, *arguments, "--chunk-frames", 5)[0] == 130
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_leaves_nothing(stop: signal.Signals, model: str, tmp_path: Path) -> None:
    source, out = tmp_path / "a.wav", tmp_path / "out.wav"
    soundfile.write(source, np.zeros(24000 * 160, np.float32), 24000)  # seconds of work, of which a part is done
    command = [sys.executable, "-m", "dualcodec_ext", "roundtrip", str(source), str(out), "--model", model]
    with subprocess.Popen(
        [*command, "--chunk-frames", "100"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, stop, signal.SIG_DFL),  # ignored in what a shell runs in the background
    ) as p:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".dualcodec-*")) and p.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert p.poll() is None, "it must still be at work"
        p.send_signal(stop)
        assert p.wait(60) == {signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "model.json"]


# Memory


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", ["narrow"], indirect=True)
def test_memory_does_not_grow_with_the_length(model: str, tmp_path: Path) -> None:
    """Twenty minutes take what two do, from file to file."""
    codec = open_codec(ModelOptions(model=model), None)
    assert codec.features is not None
    peaks: dict[str, list[int]] = {"encode": [], "decode": []}
    for minutes in (1, 2, 20):  # the first run takes what every later one uses again
        source, codes, target = (tmp_path / f"{minutes}{ending}" for ending in (".wav", SUFFIX, ".out.wav"))
        second = vowels("aieou").samples[:24000]
        with soundfile.SoundFile(source, "w", 24000, 1) as file:
            for _ in range(60 * minutes):
                file.write(second)

        def encode(source: Path = source, codes: Path = codes) -> None:
            with AudioReader(source) as reader:
                write_codes(codes, long.encode_long(codec, reader, None, 1500, lambda done_s: None))

        def decode(codes: Path = codes, target: Path = target) -> None:
            pieces = long.decode_long(codec, map_codes(codes, check=True), None, 1500, lambda done_s: None)
            long.write_pieces(target, pieces, 24000, "wav", None)

        for name, call in (("encode", encode), ("decode", decode)):
            peak = peak_extra_bytes(call)
            if peak is None:
                pytest.skip("resident memory can't be read here")
            peaks[name].append(peak)
        assert soundfile.info(target).frames == minutes * 60 * 24000
    audio_bytes = 20 * 60 * 24000 * 4
    for name, (_, short, long_one) in peaks.items():
        assert long_one - short < 24 * 2**20 < audio_bytes / 4, (name, short, long_one)


# Windows of features


def frames_of(audio: torch.Tensor) -> torch.Tensor:
    """One number per whole frame of ten samples, and the last frame left out: [1, 1, F]."""
    return audio.unfold(-1, 10, 10)[:, :, :, 0][..., :-1] if audio.shape[-1] >= 20 else audio[..., :0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 900), st.integers(1, 300), st.integers(7, 40), st.integers(0, 60))
def test_windows_join_to_the_frames_of_the_whole(frames: int, piece: int, window: int, whole: int) -> None:
    audio = torch.arange(frames * 10, dtype=torch.float32).reshape(1, 1, -1)
    lengths: list[int] = []

    def compute(part: torch.Tensor) -> torch.Tensor:
        lengths.append(part.shape[-1])
        return frames_of(part)

    made = FeatureWindows(compute, 10, 100, window / 10, 0.1, whole / 10)
    parts = [made.write(audio[..., at : at + piece]) for at in range(0, frames * 10, piece)]
    assert torch.equal(torch.cat([*parts, made.finish()], -1), frames_of(audio))
    assert max(lengths, default=0) <= 10 * max(window, whole)


def test_windows_give_what_lies_further_from_their_edges() -> None:
    def compute(part: torch.Tensor) -> torch.Tensor:  # how far each frame is from the window's nearer edge
        n = part.shape[-1] // 10
        return torch.minimum(torch.arange(n), n - 1 - torch.arange(n)).reshape(1, 1, n)

    made = FeatureWindows(compute, 10, 100, window_s=3.0, overlap_s=1.0, whole_s=0)
    found = torch.cat([made.write(torch.zeros(1, 1, 2000)), made.finish()], -1)[0, 0]
    assert len(found) == 200 and found[5:-5].min() >= 4


@pytest.mark.parametrize("window_s, overlap_s", [(10, 5), (30, -1), (0, 0)])
def test_wrong_windows_are_one_line(window_s: float, overlap_s: float) -> None:
    with pytest.raises(DualCodecError, match="features: window_s must be longer than twice overlap_s"):
        FeatureWindows(frames_of, 1920, 24000, window_s, overlap_s)
