"""What a run of training refuses, keeps and says: settings, data, where it begins and where it goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from test_training import SMALL, STEPS, lines, one_thread, recipe, speech, voices
from w2v_bert import STATISTICS_FILE, save_w2v_bert

import dualcodec_ext as dx
from dualcodec_ext import backend, cli
from dualcodec_ext._training.data import Voice
from dualcodec_ext._training.forward import Forward
from dualcodec_ext._training.recipe import Recipe
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.model import FEATURES
from dualcodec_ext.training import Trainer, _voices, train

__all__ = ["one_thread", "speech", "voices"]  # fixtures

W2V_MODEL = SMALL | {"semantic_dim": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a number from 0, got 'fast'"),
        ({"seed": "a"}, "seed must be an integer from 0, got 'a'"),
        ({"memory_steps": 0}, "memory_steps must be an integer from 1, got 0"),
        ({"bypass": 2}, "bypass must be a number from 0 to 1, got 2"),
        ({"ema_decay": float("nan")}, "ema_decay must be a number from 0 to 1, got nan"),
        ({"clip": -1}, "clip must be a number from 0, got -1"),
        ({"betas": [0.9]}, "betas must hold two numbers, got 1"),
        ({"betas": 5}, "betas must be a list of numbers, got 5"),
        ({"windows": [0, 512]}, "each of windows must be an integer from 4, got 0"),
        ({"losses": 3}, "losses must be an object, got 3"),
        ({"losses": {"mel": "loud"}}, "losses: mel must be a number from 0, got 'loud'"),
        ({"voices": {"a": -1}}, "voices: a must be a number from 0, got -1"),
        ({"adversary": {"colour": 1}}, "adversary must be among periods, windows, width, learning_rate, got colour"),
        ({"adversary": {"periods": "x"}}, "adversary: periods must be a list of numbers, got 'x'"),
        ({"adversary": {"periods": [2, 0]}}, "each of adversary: periods must be an integer from 1 to 4800, got 0"),
        ({"adversary": {"periods": [4801]}}, "each of adversary: periods must be an integer from 1 to 4800, got 4801"),
        ({"adversary": {"windows": [0]}}, "each of adversary: windows must be an integer from 4, got 0"),
        ({"adversary": {"periods": [], "windows": []}}, "adversary must have periods or windows, got neither"),
        ({"adversary": {"width": "a"}}, "adversary: width must be an integer from 1, got 'a'"),
        ({"adversary": {"width": 2.5}}, "adversary: width must be an integer from 1, got 2.5"),
        ({"adversary": {"learning_rate": None}}, "adversary: learning_rate must be a number from 0, got None"),
        ({"adversary_from": -1}, "adversary_from must be an integer from 0, got -1"),
        ({"highest_hz": "all"}, "highest_hz must be a number from 0, got 'all'"),
        ({"count_odds": 1}, "count_odds must be a list of numbers, got 1"),
        ({"count_odds": [1, -1]}, "each of count_odds must be a number from 0, got -1"),
        ({"count_odds": [1, 1]}, "count_odds must hold 3 numbers, not all of them 0, got [1, 1]"),
        ({"count_odds": [0, 0, 0]}, "count_odds must hold 3 numbers, not all of them 0, got [0, 0, 0]"),
        ({"augment": 1}, "augment must be true or false, got 1"),
        ({"model": None}, "model must be a preset's name or an object, got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DualCodecError, match=re.escape(f"recipe: {message}")):
        recipe(**changes)


def test_one_kind_of_discriminator_is_enough() -> None:
    assert recipe(adversary={"periods": []}).adversary == {"periods": []}
    assert recipe(adversary={"windows": [], "periods": [4800]}).adversary["windows"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_rates": [4, 4, 4, 4], "decoder_rates": [4, 4, 4, 4]}, "a hop of 480, got 24000 and 256"),
        ({"sample_rate": 16000}, "sample_rate=24000 and a hop of 480, got 16000 and 480"),
    ],
    ids=["hop", "rate"],
)
def test_log_mel_features_want_their_rate(changes: dict[str, Any], message: str, voices: list[Voice]) -> None:
    with pytest.raises(DualCodecError, match=message):
        Trainer(recipe(model=SMALL | changes), voices)


def test_the_last_speaker_is_held_out_of_training(speech: Path, tmp_path: Path) -> None:
    shutil.copytree(speech / "train", tmp_path / "train")
    shutil.copytree(speech / "validation" / "voice1", tmp_path / "train" / "voice1")
    trained, held_out = _voices(tmp_path, 24000, recipe())
    assert [voice.name for voice in trained] == ["voice0"] and [voice.name for voice in held_out] == ["voice1"]
    shutil.rmtree(tmp_path / "train" / "voice1")
    with pytest.raises(DualCodecError, match="must hold train/ and validation/, or folders of two speakers"):
        _voices(tmp_path, 24000, recipe())


def test_weights_bring_their_statistics(voices: list[Voice]) -> None:
    weights = dict(dx.DualCodec(**SMALL).state_dict())
    mean, variance = torch.linspace(-3, 1, 160), torch.linspace(2, 9, 160)
    weights |= {FEATURES + "mean": mean, FEATURES + "variance": variance}
    trainer = Trainer(recipe(start_steps=STEPS), voices, weights=weights)
    trainer.start()
    assert not trainer.left
    assert torch.equal(trainer.state.features.mean, mean) and torch.equal(trainer.state.features.variance, variance)
    # Codebooks that came are used from the first step on: no start without them, and none from k-means behind it.
    assert trainer._quantized() and trainer.step()["codebook"] > 0
    fresh = Trainer(recipe(start_steps=STEPS), voices)
    fresh.start()
    assert not fresh._quantized() and not torch.equal(fresh.state.features.mean, mean)


def given_to(voices: list[Voice], **model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Trainer]:
    """The weights of a small model, and what a trainer on one with other settings starts from with them."""
    torch.manual_seed(3)
    given = dx.DualCodec(**SMALL).state_dict()
    trainer = Trainer(recipe(model=SMALL | model, start_steps=2), voices, weights=given)
    trainer.start()
    return given, trainer.state.model.state_dict(), trainer


def is_along_axes(found: dict[str, torch.Tensor], stage: int) -> bool:
    name = f"dac.quantizer.quantizers.{stage}.out_proj.weight_"
    axes = torch._weight_norm(found[f"{name}v"], found[f"{name}g"])[..., 0]
    return torch.allclose(axes.t() @ axes, torch.eye(8), atol=1e-4)


def test_codebooks_that_do_not_fit_start_as_from_nothing(voices: list[Voice]) -> None:
    given, found, trainer = given_to(voices, codebook_size=64)
    assert len(trainer.left) == 2 and all(line.endswith("[32, 8] there, [64, 8] needed") for line in trainer.left)
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith("dac.quantizer."))
    before = found["dac.quantizer.quantizers.0.codebook.weight"].clone()
    for step in range(3):
        assert trainer._quantized() == (step == 2)
        trainer.step()
    assert not torch.equal(trainer.state.model.state_dict()["dac.quantizer.quantizers.0.codebook.weight"], before)

    given, found, _ = given_to(voices, semantic_codebook_size=48)
    book = "semantic_vq.quantizers.0.codebook.weight"
    assert all(torch.equal(found[name], given[name]) for name in given if name != book)
    torch.manual_seed(0)
    raw = dx.DualCodec(**SMALL | {"semantic_codebook_size": 48}).state_dict()[book]
    assert float(found[book].std()) < 0.8 * float(raw.std())  # no longer drawn: rows of what is searched for


def test_codebooks_beyond_the_given_ones_are_started(voices: list[Voice]) -> None:
    given, found, trainer = given_to(voices, n_codebooks=3)
    assert trainer._quantized()  # as the given ones are
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert [is_along_axes(found, stage) for stage in range(3)] == [False, False, True]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_a_codec_is_taken_over(part: str, voices: list[Voice]) -> None:
    """The other half is scaled as from nothing; codebooks stay, they are what the half that came knows."""
    given, found, _ = given_to(voices, **({"encoder_dim": 6} if part == "decoder" else {"decoder_dim": 64}))
    other = "encoder" if part == "decoder" else "decoder"
    alphas = [value for name, value in found.items() if name.startswith(f"dac.{other}.") and name.endswith("alpha")]
    assert len(alphas) > 10 and all(bool((alpha == 0.25).all()) for alpha in alphas)
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith(f"dac.{other}."))


def test_weights_of_another_model_are_refused(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], voices: list[Voice]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe().to_dict()))
    options = ["--config", tmp_path / "recipe.json", "--data", speech, "--out", tmp_path / "out", "--init", "tiny"]
    assert cli.main(["train", *map(str, options)]) == 2
    assert float(torch.tensor(2.0**-130) * 1.0) > 0  # numbers so small are zeros while it trains, and no longer
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("train: ")  # how much speech there is
    assert re.search(
        r"train: the weights must fit the encoder or the decoder of the recipe's model, got \d+ tensors that set \d+ of"
        r" its \d+; the first that is lacking: dac\.\S+: \[\d.*\] there, \[\d.*\] needed$",
        told[1],
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(DualCodecError, match=r"got 1 tensors that set 0 of its \d+; .*: not in the weights$"):
        Trainer(recipe(), voices, weights={"layers.0": torch.zeros(2)})


def test_a_run_is_not_written_over(speech: Path, tmp_path: Path) -> None:
    """A second run needs --resume or another folder; a resumed one says where it stands and what has changed."""
    out, told = tmp_path / "out", []  # type: tuple[Path, list[str]]
    with pytest.raises(DualCodecError, match=r"cannot read .*nothing: no such file"):
        train(recipe(), tmp_path / "nothing", out)
    assert not out.exists()
    scores = train(recipe(steps=10), speech, out, resume=True, tell=told.append)
    assert f"{out} holds no checkpoint to go on from: beginning anew" in told
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DualCodecError, match=f"{re.escape(str(out))} holds a run: --resume goes on with it"):
        train(recipe(steps=10), speech, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(DualCodecError, match="steps must be at least the checkpoint's 10, got 5"):
        train(recipe(steps=5), speech, out, resume=True)
    told.clear()
    assert train(recipe(steps=10), speech, out, resume=True, tell=told.append) == scores != {}
    assert "going on from step 10: the last one" in told
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # cut off
    told.clear()
    train(recipe(steps=12, voices={"nobody": 2.0}, batch=2), speech, out, resume=True, tell=told.append)
    assert {"recipe: steps was 10 before, and is 12", "recipe: batch was 4 before, and is 2"} < set(told)
    assert "recipe: voices: no speaker's name begins with nobody" in told
    assert [line["step"] for line in lines(out)] == [5, 10, 10, 12]
    (out / "log.jsonl").write_text('{"step": 5\n{"step": 10}\n')
    with pytest.raises(DualCodecError, match=r"log\.jsonl must hold JSON in line 1, got: "):
        train(recipe(steps=12), speech, out, resume=True)


def test_the_checkpoint_of_another_model(speech: Path, tmp_path: Path) -> None:
    train(recipe(steps=1), speech, tmp_path)
    with pytest.raises(DualCodecError, match=r"of this recipe's model: Error.*: size mismatch for .*") as caught:
        train(recipe(model=SMALL | {"latent_dim": 20}), speech, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_statistics_beside_the_checkpoint(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layout of the PyPI package's downloads: w2v-BERT in one folder, its statistics with the codec's weights."""
    w2v = save_w2v_bert(tmp_path / "w2v", layers=17)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (w2v / STATISTICS_FILE).rename(checkpoints / STATISTICS_FILE)
    save_file(dx.DualCodec(**W2V_MODEL).state_dict(), checkpoints / "start.safetensors")
    settings = json.loads(json.dumps(recipe(model=W2V_MODEL, steps=2, log_every=1).to_dict()))
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    options = ["--config", tmp_path / "recipe.json", "--data", speech, "--out", tmp_path / "out", "--w2v", w2v]
    assert cli.main(["train", *map(str, options), "--weights", str(checkpoints / "start.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert "not taken over" not in err
    scores = json.loads(out.split(": ", 1)[1])
    assert len(scores["entropy_bits"]) == 3


def test_the_reference_backend_wins_over_the_way() -> None:
    model = dx.DualCodec(**SMALL)
    assert [Forward(model, way).way for way in ("auto", "ops", "channels_last")] == ["ops", "ops", "channels_last"]
    with backend("reference"):
        assert {Forward(model, way).way for way in ("auto", "ops", "channels_last")} == {"reference"}


def test_the_recipes_forward_is_the_ops() -> None:
    made = Recipe.load("tiny")
    assert Forward(dx.DualCodec(**SMALL), made.way).way == "ops"


def test_too_short_voices_are_named(voices: list[Voice], speech: Path, tmp_path: Path) -> None:
    shutil.copytree(speech, tmp_path / "speech")
    (tmp_path / "speech" / "train" / "brief").mkdir()
    soundfile.write(tmp_path / "speech" / "train" / "brief" / "a.wav", np.zeros(2000, np.float32), 24000)
    told: list[str] = []
    train(recipe(steps=1), tmp_path / "speech", tmp_path / "out", tell=told.append)
    assert "train: brief is left out: shorter than a segment" in told


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("info", "[default: (tiny's weights)]"),
        ("train", "[default: (the hub)]"),
        ("decode", "[default: (the model's)]"),
        ("encode", "[default: (all)]"),
        ("stream", "[default: (as many as it needs)]"),
    ],
)
def test_help_tells_defaults(command: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert wanted in text
