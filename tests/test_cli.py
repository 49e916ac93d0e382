"""The command line: real files through encode, decode and roundtrip, and one clear line for what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import dualcodec_ext as dx
from dualcodec_ext import cli, testing
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext.codes import read_codes

# Small, but at 50 feature frames a second: hop 480, one frame per feature frame.
SMALL = {
    "encoder_dim": 8,
    "encoder_rates": [4, 5, 6, 4],
    "decoder_rates": [4, 6, 5, 4],
    "decoder_dim": 32,
    "n_codebooks": 3,
    "codebook_size": 64,
    "semantic_codebook_size": 128,
    "convnext_dim": 24,
    "convnext_layers": 1,
    "convnext_intermediate_dim": 32,
    "semantic_dim": 20,
    "semantic_downsample_factor": 1,
    "sample_rate": 24000,
}


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, vowels("ai").samples, 24000)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def wave(path: Path, rate: int, samples: int, channels: int = 1, **options: Any) -> Path:
    t = np.arange(samples) / rate
    data = np.stack([0.3 * np.sin(2 * np.pi * (200 + 100 * c) * t) for c in range(channels)], 1)
    soundfile.write(path, data, rate, **options)
    return path


@pytest.mark.parametrize(
    "name, rate, samples, channels, kind",
    [
        ("mono.wav", 24000, 24000, 1, {}),
        ("stereo.flac", 44100, 44099, 2, {}),
        ("narrow.wav", 8000, 7001, 1, {"subtype": "ULAW"}),
        ("lossy.ogg", 48000, 30001, 2, {}),
        ("lossy.mp3", 16000, 20000, 1, {}),
        ("float.wav", 96000, 9600, 1, {"subtype": "FLOAT"}),
        ("one.wav", 24000, 1, 1, {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_any_file_keeps_its_length(
    name: str, rate: int, samples: int, channels: int, kind: dict[str, str], tmp_path: Path, small: str, capsys: Any
) -> None:
    source = wave(tmp_path / name, rate, samples, channels, **kind)
    n = soundfile.info(source).frames  # what a lossy format made of it
    codes, out = tmp_path / "codes", tmp_path / "out"
    assert run(capsys, "encode", source, "-o", codes, "--model", small)[0] == 0
    file = codes / f"{source.stem}.codes.safetensors"
    assert read_codes(file).source_samples == n
    assert run(capsys, "decode", file, "-o", out)[0] == 0
    info = soundfile.info(out / f"{source.stem}.wav")
    assert (info.frames, info.samplerate, info.channels) == (round(n * 24000 / rate), 24000, 1)
    assert run(capsys, "decode", file, "-o", out, "--rate", rate, "--format", "flac")[0] == 0
    info = soundfile.info(out / f"{source.stem}.flac")
    assert (info.frames, info.samplerate) == (n, rate)


def test_roundtrip_on_the_released_architecture(speech: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "out.wav"
    code, out, err = run(capsys, "roundtrip", speech, target, "--model", "12hz_v1")
    assert code == 0 and "untrained: not intelligible" in out and "untrained: not intelligible" in err
    assert soundfile.info(target).frames == soundfile.info(speech).frames
    assert "untrained" in soundfile.SoundFile(target).comment


def test_fast_decodes_the_same_codes_otherwise(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, "encode", speech, "-o", tmp_path, "--model", small)[0] == 0
    codes = tmp_path / "speech.codes.safetensors"
    waves = []
    for name, options in (("exact", []), ("fast", ["--fast"])):
        assert run(capsys, "decode", codes, "-o", tmp_path / name, "--format", "au", *options)[0] == 0
        target = tmp_path / f"{name}.au"
        assert run(capsys, "roundtrip", speech, target, "--model", small, *options)[0] == 0
        waves.append(soundfile.read(tmp_path / name / "speech.au", dtype="float32")[0])
    assert np.abs(waves[0] - waves[1]).max() < 1e-3
    code, _, err = run(capsys, "decode", codes, "-o", tmp_path / "half", "--fast", "--dtype", "bfloat16")
    assert code == 2 and "fast needs float32 on the CPU, got bfloat16" in err and err.count("\n") == 1


def test_encode_then_decode_is_the_roundtrip(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    assert run(capsys, "roundtrip", speech, tmp_path / "a.wav", "--model", small, "-q", 3)[0] == 0
    assert run(capsys, "encode", speech, "-o", tmp_path, "--model", small, "-q", 3)[0] == 0
    assert run(capsys, "decode", tmp_path / "speech.codes.safetensors", "-o", tmp_path / "b")[0] == 0
    a, b = (soundfile.read(p)[0] for p in (tmp_path / "a.wav", tmp_path / "b" / "speech.wav"))
    np.testing.assert_array_equal(a, b)


def test_codes_are_the_models(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    """The file holds what the plain reference gives for the same audio, features and weights."""
    assert run(capsys, "encode", speech, "-o", tmp_path, "--model", small)[0] == 0
    stored = read_codes(tmp_path / "speech.codes.safetensors")
    from dualcodec_ext._cli.features import SeededFeatures

    config = dx.DualCodecConfig.from_dict(SMALL)
    model = testing.seeded_model(config.to_dict())
    audio = torch.from_numpy(soundfile.read(speech, dtype="float32")[0])[None, None]
    semantic, acoustic = model.encode(audio, semantic_repr=SeededFeatures(config, 0)(audio))
    assert (semantic[0].numpy() == stored.semantic).all() and (acoustic[0].numpy() == stored.acoustic).all()
    assert stored.untrained and stored.features.startswith("log-mel")


def test_trained_weights_travel_by_their_hash(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    """A file decodes with the weights that made it, and says so where they are missing or others."""
    paths = []
    for seed in (1, 2):
        model = testing.seeded_model(SMALL, seed)
        paths.append(tmp_path / f"weights{seed}.safetensors")
        save_file(model.state_dict(), paths[-1])
    # Real weights want real features: without a semantic model that is one clear line.
    code, _, err = run(
        capsys, "encode", speech, "-o", tmp_path, "--model", small, "--weights", paths[0], "--w2v", "none"
    )
    assert code == 2 and "--w2v DIR names a folder with w2v-BERT 2.0" in err and len(err.splitlines()) == 1
    from dataclasses import replace

    from dualcodec_ext._cli.codec import file_digest
    from dualcodec_ext.codes import write_codes

    run(capsys, "encode", speech, "-o", tmp_path, "--model", small)
    file = tmp_path / "speech.codes.safetensors"
    write_codes(file, replace(read_codes(file), weights=file_digest(paths[0])))
    assert run(capsys, "decode", file, "-o", tmp_path / "out", "--weights", paths[0])[0] == 0
    for arguments, text in (((), "say where they are with --weights"), (("--weights", paths[1]), "were made with")):
        code, _, err = run(capsys, "decode", file, "-o", tmp_path / "other", *arguments)
        assert code == 2 and text in err
    assert not list((tmp_path / "other").glob("*"))
    assert run(capsys, "decode", file, "-o", tmp_path / "other", "--weights", paths[1], "--any-weights")[0] == 0


def test_a_batch_goes_on_and_lists_what_failed(tmp_path: Path, small: str, capsys: Any) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.wav", "deep/b.wav"):
        wave(folder / name, 24000, 5000)
    (folder / "broken.wav").write_bytes(b"RIFF but not really")
    (folder / "empty.wav").write_bytes(b"")
    wave(folder / "silent.wav", 24000, 0)
    (folder / "notes.txt").write_text("no audio")
    out = tmp_path / "codes"
    code, _, err = run(capsys, "encode", folder, tmp_path / "*.nothing", "-o", out, "--model", small)
    assert code == 2
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "a.codes.safetensors",
        "deep/b.codes.safetensors",
    ]
    for name in ("broken.wav", "empty.wav", "silent.wav", "*.nothing"):
        assert name in err, name
    assert "notes.txt" not in err


def test_missing_weights_are_one_error_for_a_batch(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    codes = tmp_path / "codes"
    run(capsys, "encode", speech, wave(tmp_path / "b.wav", 24000, 5000), "-o", codes, "--model", small)
    code, _, err = run(capsys, "decode", codes, "-o", tmp_path / "out", "--weights", tmp_path / "none.safetensors")
    assert code == 2 and err.splitlines() == [
        f"dualcodec-ext: error: --weights: {tmp_path}/none.safetensors: no such file or folder"
    ]
    assert not (tmp_path / "out").exists()


def test_a_backend_that_cannot_run_is_one_plain_line(
    speech: Path, small: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALCODEC_EXT_BACKEND", "nope")
    code, _, err = run(capsys, "encode", speech, "-o", tmp_path / "out", "--model", small)
    assert code == 2 and "dualcodec-ext: error: DUALCODEC_EXT_BACKEND must be one of auto," in err
    assert not (tmp_path / "out").exists()


def test_json(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "encode", speech, tmp_path / "none.wav", "-o", tmp_path, "--model", small, "--json")
    document = json.loads(out)
    assert code == 2 and document["untrained"] is True and document["note"] == "untrained: not intelligible"
    text = json.dumps(document)
    assert "speech.codes.safetensors" in text and "none.wav" in text
    code, out, _ = run(capsys, "info", tmp_path / "speech.codes.safetensors", "--json")
    assert code == 0 and json.loads(out)["frame_rate_hz"] == 50.0
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0 and "backends" in json.dumps(json.loads(out))


def test_info_reads_codes_weights_and_audio(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    run(capsys, "encode", speech, "-o", tmp_path, "--model", small)
    save_file(testing.seeded_model(SMALL).state_dict(), tmp_path / "weights.safetensors")
    for file, text in (
        ("speech.codes.safetensors", "bitrate"),
        ("weights.safetensors", "weights"),
        ("speech.wav", "24000"),
    ):
        code, out, _ = run(capsys, "info", tmp_path / file)
        assert code == 0 and text in out, file


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["encode", "none.wav", "-o", "out"], "none.wav"),
        (["roundtrip", "none.wav", "out.wav"], "cannot read none.wav: no such file or directory"),
        (["roundtrip", "IN", "out.xyz"], "xyz"),
        (["roundtrip", "IN", "none/out.wav"], "there is no folder none"),
        (["roundtrip", "IN", "IN"], "is the input as well"),
        (["encode", "IN", "-o", "out", "--model", "13hz"], "--model must be one of 12hz_v1, 25hz_v1"),
        (["encode", "IN", "-o", "out", "--model", "x"], "tiny, or a file of settings, NAME.json, got x"),
        (["encode", "IN", "-o", "out", "--weights", "nosuch"], "error: --weights: nosuch must be a directory or"),
        (["roundtrip", "IN", "o.wav", "--weights", "nosuch"], "error: --weights: nosuch must be a directory or"),
        (["roundtrip", "IN", "o.wav", "--codes", "IN"], "--codes: IN: is the input as well"),
        (["roundtrip", "IN", "o.wav", "--plot", "IN"], "--plot: IN: is the input as well"),
        (["roundtrip", "IN", "o.wav", "--codes", "o.wav"], "--codes: o.wav: is OUT as well"),
        (["roundtrip", "IN", "o.wav", "--codes", "./o.wav"], "--codes: o.wav: is OUT as well"),
        (["roundtrip", "IN", "o.png", "-f", "wav", "--plot", "o.png"], "--plot: o.png: is OUT as well"),
        (["roundtrip", "IN", "o.wav", "--codes", "c.png", "--plot", "c.png"], "--plot: c.png: is --codes as well"),
        (["roundtrip", "IN", "o.wav", "--plot", "p.xyz"], "--plot: p.xyz must end in one of .png, "),
        (["roundtrip", "IN", "o.wav", "--plot", "p"], "--plot: p must end in one of .png, "),
        (["encode", "IN", "-o", "out", "--model", "none.json"], "cannot read none.json"),
        (["encode", "IN", "-o", "out", "--weights", "none.safetensors"], "none.safetensors"),
        (["encode", "IN", "-o", "out", "-q", "11"], "--quantizers must be 1 to 10 for tiny, got 11"),
        (["encode", "IN", "-o", "out", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["encode", "IN", "-o", "IN"], "is not a folder"),
        (["decode", "IN", "-o", "out"], "IN"),
        (["info", "none"], "none"),
        (["verify", "--weights", "none.safetensors"], "none.safetensors"),
        (["verify", "--weights", "ckpts/none.safetensors"], "ckpts/none.safetensors must be a directory or a safe"),
        (["verify", "--weights", "IN"], "IN must be a readable safetensors file"),
        (["encode", "IN"], "--output"),
        (["encode", "IN", "-o", "out", "--dtype", "int8"], "int8"),
        (["play", "IN"], "play"),
    ],
    ids=lambda v: " ".join(v[:1] + v[2:]) if isinstance(v, list) else "",
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], text: str, speech: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    content = speech.read_bytes()
    code, out, err = run(capsys, *[str(speech) if a == "IN" else a for a in arguments])
    assert code == 2 and not out
    assert text.replace("IN", str(speech)) in err and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2  # the line, and in a batch the count of failures
    assert sorted(p.name for p in tmp_path.rglob("*")) == before and speech.read_bytes() == content


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard"])
def test_links_to_an_input_are_refused(link: Any, speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    other, content = tmp_path / "other.wav", speech.read_bytes()
    link(speech, other)
    for arguments in ((other,), (tmp_path / "new.wav", "--codes", other)):
        code, _, err = run(capsys, "roundtrip", speech, *arguments, "--model", small)
        assert code == 2 and f"{other}: is the input as well" in err
    folder = tmp_path / "codes"
    folder.mkdir()
    link(speech, folder / "speech.codes.safetensors")
    code, _, err = run(capsys, "encode", speech, "-o", folder, "--model", small)
    assert code == 2 and f"its output {folder}/speech.codes.safetensors is an input as well" in err
    assert speech.read_bytes() == content


def test_weights_and_settings_are_not_overwritten(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(testing.seeded_model(SMALL).state_dict(), weights)
    for option, file in (("--weights", weights), ("--model", Path(small))):
        content = file.read_bytes()
        asked = ("--model", small, "--weights", weights, "--codes", file)
        code, _, err = run(capsys, "roundtrip", speech, tmp_path / "o.wav", *asked)
        assert code == 2 and f"--codes: {file}: is {option} as well" in err and file.read_bytes() == content


def test_decode_spares_codes_of_any_name(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    """A code file may be called *.wav, and then so would its audio."""
    run(capsys, "encode", speech, "-o", tmp_path, "--model", small)
    codes = (tmp_path / "speech.codes.safetensors").rename(tmp_path / "a.wav")
    content = codes.read_bytes()
    code, _, err = run(capsys, "decode", codes, "-o", tmp_path)
    assert code == 2 and f"its output {codes} is an input as well" in err and codes.read_bytes() == content


def test_two_outputs_may_be_one_device(speech: Path, small: str, capsys: Any) -> None:
    devices = (os.devnull, "--codes", os.devnull)
    assert run(capsys, "roundtrip", speech, *devices, "--model", small, "--format", "wav")[0] == 0


def test_a_plot_without_matplotlib_is_refused_first(
    speech: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    code, _, err = run(capsys, "roundtrip", speech, tmp_path / "o.wav", "--plot", tmp_path / "p.png")
    assert code == 2 and "--plot needs matplotlib: pip install" in err and not (tmp_path / "o.wav").exists()


def test_a_full_disk(speech: Path, small: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a write, then no space: one line, no partial file, and an older result stays as it was."""
    target = tmp_path / "out.wav"
    target.write_bytes(b"older result")
    before = sorted(tmp_path.iterdir())
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) > 1000:
            real(handle, data[:500])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        code, _, err = run(capsys, "roundtrip", speech, target, "--model", small)
    assert code == 2 and "no space left on device" in err
    assert target.read_bytes() == b"older result" and sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_device_that_is_full(speech: Path, small: str, capsys: Any) -> None:
    code, _, err = run(capsys, "roundtrip", speech, "/dev/full", "--model", small, "--format", "wav")
    assert code == 2 and "cannot write /dev/full: no space left on device" in err


def test_verify_passes_and_fails(tmp_path: Path, small: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(testing.seeded_model(SMALL).state_dict(), weights)
    code, out, err = run(capsys, "verify", "--weights", weights, "--model", small)
    assert code == 0 and "PASS" in out, err
    from dualcodec_ext.engine import Engine

    real = Engine.decode_clips
    monkeypatch.setattr(Engine, "decode_clips", lambda self, *a: real(self, *a) * 1.001)
    code, out, _ = run(capsys, "verify", "--weights", weights, "--model", small)
    assert code == 1 and "FAIL" in out


def test_threads_and_dtype(speech: Path, small: str, tmp_path: Path, capsys: Any) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in ("bfloat16", "float16"):
            target = tmp_path / f"{dtype}.wav"
            assert run(capsys, "roundtrip", speech, target, "--model", small, "--dtype", dtype, "--threads", 1)[0] == 0
            assert torch.get_num_threads() == 1 and target.exists()
    finally:
        torch.set_num_threads(before)


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dualcodec_ext", "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0
    for name in ("roundtrip", "encode", "decode", "info", "doctor", "verify", "bench"):
        assert name in shown.stdout
