"""`python -m dualcodec_ext.demo`: what `make demo` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile

from dualcodec_ext import demo
from dualcodec_ext._cli import voice


def test_demo_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no synthesiser: vowels
    target = tmp_path / "out.wav"
    assert demo.main(["--output", str(target), "--rounds", "1", "--model", "12hz_v1"]) == 0
    text = capsys.readouterr().out
    assert "a generated vowel sequence" in text and text.count("untrained: not intelligible") == 2
    assert "codes: semantic [1, 1, 30], acoustic [1, 7, 30], 12.5 frames/s; audio: [57600] at 24000 Hz" in text
    equal, total = map(int, re.search(r"(\d+) of (\d+) codes equal", text).groups())  # type: ignore[union-attr]
    assert total == 240 and equal >= 236
    assert float(re.search(r"at most (\S+) apart", text)[1]) < 2e-4  # type: ignore[index]
    assert re.search(r"decode: \S+x real time, plain PyTorch \S+x, ratio \S+", text)
    assert soundfile.info(target).frames == 57600


def test_demo_with_the_packages_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.wav"
    assert demo.main(["--output", str(target), "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert "model: tiny, 1.9 million parameters, trained" in text and "untrained" not in text
    equal, total = map(int, re.search(r"(\d+) of (\d+) codes equal", text).groups())  # type: ignore[union-attr]
    assert total % 10 == 0 and equal >= 0.98 * total
    assert soundfile.info(target).samplerate == 24000


def test_a_result_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--output", str(tmp_path / "none" / "out.wav"), "--rounds", "1"]) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]


def test_vowels_are_the_same_every_time() -> None:
    first, second = voice.vowels(), voice.vowels()
    assert (first.samples == second.samples).all() and abs(first.samples).max() <= 0.61
    assert len(first.samples) == 57600 and first.sample_rate_hz == 24000
