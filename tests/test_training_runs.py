"""A training run from its folder to its pictures, and the command line's --resume, --init and progress."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_training import recipe
from test_training_parts import with_files_of_at_most
from torch import Tensor

from dualcodec_ext import cli, training
from dualcodec_ext._cli import train as command
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext._training import scores
from dualcodec_ext._training.data import load_voices
from dualcodec_ext._training.plots import draw_spectrograms
from dualcodec_ext._training.scores import speech_scores
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.hub import BUNDLED
from dualcodec_ext.training import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")
SPEAKERS = ("train/anna", "train/otto", "validation/maria")
STEP_S = 0.5


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Voices that differ, all of one length."""
    folder = tmp_path_factory.mktemp("speech")
    for i, speaker in enumerate(SPEAKERS):
        (folder / speaker).mkdir(parents=True)
        soundfile.write(folder / speaker / "one.wav", vowels("aeiou", seed=i).samples, 24000)
    return folder


@pytest.fixture(scope="module")
def run(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One run of two steps, and what was seen on its way: half a second a step by the clock that it reads."""
    out, clock, seen = tmp_path_factory.mktemp("run"), [0.0], SimpleNamespace(out=None, told=[], shown=[], clips=[])
    step = Trainer.step

    def stepped(trainer: Trainer) -> dict[str, float]:
        seen.odds = dict(zip(("anna", "otto"), trainer.batches._odds, strict=True))
        clock[0] += STEP_S
        return step(trainer)

    def score(model: Any, features: Any, clips: Sequence[Tensor]) -> dict[str, Any]:
        seen.clips += clips
        return {"stoi_1": 0.5 + len(seen.clips) / 1000}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        patch.setattr(Trainer, "step", stepped)
        patch.setattr(scores, "score", score)
        settings = recipe(steps=2, log_every=1, way="reference", voices={"anna": 4.0})
        seen.scores = train(settings, speech, out, tell=seen.told.append, progress=lambda *a: seen.shown.append(a))
    seen.out = out
    yield seen


def test_progress_tells_loss_and_speed(run: Any) -> None:
    audio_s = 4 * 10 * 480 / 24000  # items, frames
    assert [step for step, _, _ in run.shown] == [1, 2]
    assert all(values["loss"] > 0 for _, values, _ in run.shown)
    assert [speed for _, _, speed in run.shown] == [pytest.approx(audio_s / STEP_S)] * 2


def test_validation_hears_the_held_out_voice_alone(run: Any, speech: Path) -> None:
    held_out = load_voices(speech / "validation", 24000)[0].samples.tobytes()
    assert len(run.clips) >= 10
    for clip in run.clips:
        assert clip.shape[-1] >= 24000
        assert held_out.find((clip[0, 0] * 32767).round().to(torch.int16).numpy().tobytes()) >= 0
    assert run.scores["stoi_1"] == 0.5 + len(run.clips) / 1000
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [line["validation"] for line in lines if "validation" in line] == [run.scores]


def test_the_recipes_voices_are_drawn_more_often(run: Any) -> None:
    assert run.odds == {"anna": pytest.approx(0.8), "otto": pytest.approx(0.2)}  # they are of one length


@pytest.mark.parametrize("name", ["curves.png", "spectrograms.png"])
def test_a_run_ends_with_pictures(run: Any, name: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    assert (run.out / name).read_bytes().startswith(b"\x89PNG")
    pixels = image.imread(run.out / name)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert float((pixels[..., :3].min(-1) < 0.9).mean()) > 0.02  # something is drawn on it


def test_without_matplotlib_the_run_says_so_first(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(scores, "score", lambda model, features, clips: {"stoi_1": 0.5})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    train(recipe(steps=1, log_every=1, way="reference"), speech, tmp_path / "run", tell=told.append)
    said = "the run ends without pictures, matplotlib is missing: pip install 'dualcodec-ext[train]'"
    assert 0 < told.index(said) < told.index('step 1: {"stoi_1": 0.5}')
    assert not list((tmp_path / "run").glob("*.png"))


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, wave = tmp_path / "a.png", torch.from_numpy(vowels("ai").samples)
    draw_spectrograms(wave, wave, 24000, path)
    before = path.read_bytes()
    with pytest.raises(DualCodecError, match=r"cannot write .*a\.png: file too large"):
        with_files_of_at_most(5000, lambda: draw_spectrograms(wave, -wave / 2, 24000, path))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_voices_too_short_to_score_are_left_out(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    clips: list[Tensor] = []
    monkeypatch.setattr(scores, "score", lambda model, features, heard: clips.extend(heard) or {"stoi_1": 0.5})
    shutil.copytree(speech, tmp_path / "speech")
    (tmp_path / "speech/validation/brief").mkdir()
    soundfile.write(tmp_path / "speech/validation/brief/one.wav", vowels("a").samples[:2400], 24000)
    settings = recipe(steps=1, way="reference")
    train(settings, tmp_path / "speech", tmp_path / "run", tell=told.append)
    assert "validation: brief is left out: shorter than 0.5 s" in told
    assert clips and min(clip.shape[-1] for clip in clips) > 24000
    shutil.rmtree(tmp_path / "speech/validation/maria")
    with pytest.raises(DualCodecError, match=r"a voice of the validation must last 0\.5 s to be scored, none does"):
        train(settings, tmp_path / "speech", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("error")
def test_a_clip_of_pauses_has_no_stoi() -> None:
    pytest.importorskip("pystoi")
    wave = torch.from_numpy(vowels("aeiou").samples[:24000].copy())
    assert "stoi" in speech_scores(wave, wave, 24000)
    wave[3000:] = 0
    assert "stoi" not in speech_scores(wave, wave, 24000)


def arguments(speech: Path, folder: Path, **changes: Any) -> list[str]:
    settings = recipe(**{"batch": 2, "log_every": 1, "checkpoint_every_s": 0.0, "way": "reference", **changes})
    (folder / "recipe.json").write_text(json.dumps(settings.to_dict()))
    return ["train", "--config", str(folder / "recipe.json"), "--data", str(speech), "--out", str(folder / "run")]


def test_resume_goes_on_from_the_checkpoint(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, taken, stop_at = Trainer.step, [], 2
    monkeypatch.setattr(scores, "score", lambda model, features, clips: {"stoi_1": 0.5})

    def stepped(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == stop_at:
            raise KeyboardInterrupt
        taken.append(trainer.state.step)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stepped)
    words = arguments(speech, tmp_path, steps=4)
    assert cli.main(words) == 130
    told = capsys.readouterr().err
    assert "step 1 of 4: loss " in told and " audio-h/h" in told
    stop_at = 99
    assert cli.main([*words, "--resume", "--json"]) == 0
    assert taken == [0, 1, 2, 3]
    found = capsys.readouterr()
    assert "going on from step 2" in found.err and json.loads(found.out)["steps"] == 4


@pytest.mark.parametrize("how", [["--init", "tiny"], ["--weights", str(BUNDLED["tiny"])]], ids=lambda how: how[0])
def test_a_run_starts_from_weights(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    met: list[Trainer] = []

    def stopped(trainer: Trainer) -> dict[str, float]:
        met.append(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", stopped)
    assert cli.main([*arguments(speech, tmp_path, model="tiny", segment_frames=4), *how]) == 130
    given, model = load_file(BUNDLED["tiny"]), met[0].state.model.state_dict()
    assert given.keys() >= model.keys() and len(model) > 100
    assert all(torch.equal(given[name].float(), value) for name, value in model.items())
    assert "not in the weights" not in capsys.readouterr().err


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = command._Bar(20, on_terminal=True)
    bar.show(5, {"loss": 1.25}, 12.0)
    bar.tell("two\nlines")
    bar.close()
    shown = capsys.readouterr().err
    assert "loss 1.250, 12.0 audio-h/h" in shown and "5/20" in shown and "two lines" in shown


def test_elsewhere_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    bar = command._Bar(40, on_terminal=False)
    for i in range(1, 21):
        bar.show(i, {"loss": i / 4}, 3.0)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 40: loss 0.250, 3.0 audio-h/h",
        "step 11 of 40: loss 2.750, 3.0 audio-h/h",
    ]
