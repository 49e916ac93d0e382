"""Training: real steps on generated speech, alike on every way, resumed, started from other weights, and judged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import dualcodec_ext as dx
from dualcodec_ext import cli, training
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext._training.codebooks import CodebookCare, stages_of, start_acoustic, start_semantic
from dualcodec_ext._training.data import Batches, Voice, load_voices
from dualcodec_ext._training.forward import Forward, Output
from dualcodec_ext._training.losses import SpectralLoss, waveform_loss
from dualcodec_ext._training.muon import Muon
from dualcodec_ext._training.scores import entropy_bits
from dualcodec_ext._training.state import take_over
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.training import Recipe, Trainer, train

SMALL = {
    "encoder_dim": 4,
    "encoder_rates": [6, 5, 4, 4],
    "decoder_rates": [4, 4, 5, 6],
    "decoder_dim": 32,
    "latent_dim": 16,
    "n_codebooks": 2,
    "codebook_size": 32,
    "semantic_codebook_size": 32,
    "convnext_dim": 16,
    "convnext_layers": 1,
    "convnext_intermediate_dim": 24,
    "semantic_dim": 160,
    "semantic_downsample_factor": 1,
    "sample_rate": 24000,
    "is_causal": True,
    "causal_decoder": True,
    "causal_encoder": True,
}
CENTRED = SMALL | {"causal_decoder": False, "causal_encoder": False, "is_causal": False}
LOOK_AHEAD = SMALL | {"look_ahead": True}
STEPS = 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Ops this small cost less than waking a thread, on a busy machine much less."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": SMALL,
        "steps": STEPS,
        "batch": 4,
        "segment_frames": 10,
        "warmup_steps": 5,
        "windows": [128, 512],
        "bands": [8, 24],
        "start_batches": 3,
        "log_every": 5,
        "validate_every": 100,
    }
    return Recipe.from_dict(settings | changes)


@pytest.fixture(scope="module")
def voices() -> list[Voice]:
    made = []
    for i, text in enumerate(("aeiou", "uoiea")):
        samples = vowels(text * 2, seed=i).samples
        made.append(Voice(f"voice{i}", np.round(samples * 32767).astype(np.int16), 1.0))
    return made


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory, voices: list[Voice]) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for voice, split in zip(voices, ("train", "validation"), strict=True):
        (folder / split / voice.name).mkdir(parents=True)
        soundfile.write(folder / split / voice.name / "one.wav", voice.samples, 24000)
    return folder


def one_pass(way: str, settings: dict[str, Any]) -> tuple[Output, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = dx.DualCodec(**settings).double().train()
    with torch.no_grad():  # alphas and biases that are all alike hide what is mixed up
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    audio = 0.1 * torch.randn(2, 1, 8 * 480, dtype=torch.float64)
    features = torch.randn(2, 160, 8, dtype=torch.float64)
    output = Forward(model, way)(audio, features, torch.tensor([2, 1]))
    loss = waveform_loss(output.x, audio) + 0.25 * output.commitment + output.codebook
    loss.backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss.detach()


@pytest.mark.parametrize("settings", [SMALL, CENTRED, LOOK_AHEAD], ids=["causal", "centred", "look-ahead"])
@pytest.mark.parametrize("way", ["ops", "channels_last"])
def test_a_step_is_the_references(way: str, settings: dict[str, Any]) -> None:
    wanted, wanted_gradients, wanted_loss = one_pass("reference", settings)
    found, gradients, loss = one_pass(way, settings)
    assert all(torch.equal(a, b) for a, b in zip(wanted.codes, found.codes, strict=True))
    torch.testing.assert_close(found.x, wanted.x, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=1e-10)
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) > 100
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_the_forward_is_the_models_own() -> None:
    """Against DualCodec.forward, the definition, with every codebook in use."""
    torch.manual_seed(0)
    model = dx.DualCodec(**SMALL).train()
    audio, features = 0.1 * torch.randn(2, 1, 8 * 480), torch.randn(2, 160, 8)
    acoustic, semantic = model(audio, semantic_repr=features, bypass_quantize_rate=0.0)
    found = Forward(model, "reference")(audio, features, torch.tensor([2, 2]))
    torch.testing.assert_close(found.x, acoustic.x)
    assert torch.equal(torch.stack(found.codes[1:], 1), acoustic.codes)
    torch.testing.assert_close(found.commitment, acoustic.penalty + semantic.penalty)
    torch.testing.assert_close(found.codebook, acoustic["vq/codebook_loss"] + semantic["vq/codebook_loss"])


def test_the_backend_chooses_the_way() -> None:
    model = dx.DualCodec(**SMALL)
    assert Forward(model).way == "ops"
    with dx.backend("reference"):
        assert Forward(model).way == "reference"


def run(trainer: Trainer, steps: int = STEPS) -> list[float]:
    return [trainer.step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_learn_and_repeat(voices: list[Voice], optimizer: str) -> None:
    curves = []
    for _ in range(2):
        trainer = Trainer(recipe(optimizer=optimizer), voices)
        trainer.start()
        curves.append(run(trainer))
    assert curves[0] == curves[1]
    assert np.mean(curves[0][-5:]) < 0.9 * np.mean(curves[0][:5])


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (6, 3, 7)], ids=str)
def test_a_step_of_muon_is_orthogonal(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    Muon([p], lr=1.0).step()
    rows, columns = shape[0], math.prod(shape[1:])
    u, sizes, vh = torch.linalg.svd(p.detach().view(rows, columns), full_matrices=False)
    sizes = sizes / (0.2 * max(rows, columns) ** 0.5)
    assert float(sizes.min()) > 0.6 and float(sizes.max()) < 1.3
    # Downhill, along the gradient's own directions.
    exact = torch.linalg.svd(p.grad.view(rows, columns), full_matrices=False)
    direction = exact[0] @ exact[2]
    assert float(((u @ vh) * direction).sum()) == pytest.approx(-min(rows, columns), rel=1e-3)


def test_muon_steps_matrices_together_as_alone() -> None:
    """Of the same sides, lying or standing, as a convolution's, of others, of another dtype, and one that has no
    gradient."""
    torch.manual_seed(0)
    shapes = [(8, 40), (40, 8), (8, 5, 8), (6, 6), (8, 40), (3, 9)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    together.insert(1, torch.nn.Parameter(torch.randn(8, 40, dtype=torch.float64)))
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1, weight_decay=0.1), *(Muon([p], lr=0.1, weight_decay=0.1) for p in alone)]
    for _ in range(3):  # momentum too
        for p, q in zip(together[:-1], alone[:-1], strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert not torch.equal(together[0], together[5])


def test_acoustic_codebooks_may_start_late(voices: list[Voice]) -> None:
    trainer = Trainer(recipe(start_steps=3, segment_frames=20), voices)
    trainer.start()
    stage = trainer.state.model.dac.quantizer.stages()[0]
    before = stage.codebook.weight.clone()
    run(trainer, 3)
    assert torch.equal(stage.codebook.weight, before)  # nothing has asked them yet
    curve = run(trainer, 3)
    assert not torch.equal(stage.codebook.weight, before) and all(map(math.isfinite, curve))
    # Orthonormal but for three steps of training: there and back along the principal axes of what is left.
    with torch.no_grad():
        axes = stage.out_proj.weight()[..., 0]
    torch.testing.assert_close(axes.t() @ axes, torch.eye(8), rtol=0, atol=0.05)


def test_two_workers_give_the_curve_of_one(voices: list[Voice]) -> None:
    curves = []
    for workers in (1, 2, 2):
        trainer = Trainer(recipe(workers=workers, way="reference"), voices)
        trainer.start()
        curves.append(run(trainer, 6))
    assert curves[1] == curves[2]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_the_shipped_recipe_repeats(voices: list[Voice], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "compile_snake", lambda: False)  # takes longer than the steps
    small = recipe().to_dict()
    changes = {name: small[name] for name in ("model", "segment_frames", "windows", "bands", "start_batches", "voices")}
    settings = Recipe.load("tiny", changes | {"start_steps": 2, "way": "channels_last"})
    assert (settings.way, settings.optimizer, settings.workers) == ("channels_last", "muon", 2)
    curves = []
    for _ in range(2):
        trainer = Trainer(settings, voices)
        trainer.start()
        curves.append(run(trainer, 4))
    assert curves[0] == curves[1] and len(set(curves[0])) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_goes_on_to_the_same_curve(speech: Path, tmp_path: Path, optimizer: str) -> None:
    quiet: dict[str, Any] = {"tell": lambda line: None}
    train(recipe(optimizer=optimizer), speech, tmp_path / "whole", **quiet)
    # Half a run as an interruption leaves it: the same recipe, stopped after a checkpoint and some steps more.
    stopped = tmp_path / "stopped"
    half = recipe(checkpoint_every_s=0.0, optimizer=optimizer)

    class Interrupted(Exception):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 15:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(half, speech, stopped, progress=stop, **quiet)
    assert [line["step"] for line in lines(stopped)] == [5, 10, 15]
    train(half, speech, stopped, resume=True, **quiet)
    whole, resumed = lines(tmp_path / "whole"), lines(stopped)
    assert [line["step"] for line in resumed if "loss" in line] == [5, 10, 15, 20]
    assert whole == resumed
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_adversarial_stage(voices: list[Voice]) -> None:
    small = {"periods": [2, 3], "windows": [256], "width": 4}
    trainer = Trainer(recipe(adversary_from=5, adversary=small, workers=2), voices)
    trainer.start()
    judges = trainer.state.discriminators
    assert judges is not None
    before = {name: value.clone() for name, value in judges.state_dict().items()}
    logs = [trainer.step() for _ in range(STEPS)]
    assert "discriminator" not in logs[4] and {"discriminator", "adversarial", "feature"} <= logs[5].keys()
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert logs[-1]["discriminator"] < logs[5]["discriminator"]
    assert all(not torch.equal(value, before[name]) for name, value in judges.named_parameters())
    # The verdict reaches the model: without it a step ends elsewhere.
    plain = Trainer(recipe(workers=2), voices)
    plain.start()
    run(plain)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(trainer.state.model.parameters(), plain.state.model.parameters(), strict=True)
    )


def test_init_turns_a_centred_model_into_a_causal_one(voices: list[Voice]) -> None:
    torch.manual_seed(1)
    centred = dx.DualCodec(**CENTRED)
    trainer = Trainer(recipe(), voices, weights=centred.state_dict())
    # The upsampling layers' taps mean something else there; everything else is taken over.
    assert trainer.left and all(".block.1." in line for line in trainer.left)
    ours = trainer.state.model.state_dict()
    given = centred.state_dict()
    torch.testing.assert_close(ours["dac.decoder.model.0.conv.weight_v"], given["dac.decoder.model.0.weight_v"])
    torch.testing.assert_close(ours["dac.encoder.block.1.block.4.conv.bias"], given["dac.encoder.block.1.block.4.bias"])
    book = given["semantic_vq.quantizers.0.codebook.weight"]
    trainer.start()  # the codebooks that came stay
    torch.testing.assert_close(trainer.state.model.semantic_vq.stages()[0].codebook.weight, book)
    curve = run(trainer)
    assert np.mean(curve[-5:]) < np.mean(curve[:5])


def test_take_over_lists_what_is_left() -> None:
    model = dx.DualCodec(**SMALL)
    weights = {"dac.encoder.block.0.conv.bias": torch.zeros(3), "no.such": torch.zeros(1)}
    left = take_over(model, weights).left
    assert "dac.encoder.block.0.conv.bias: [3] there, [4] needed" in left
    assert left[-1] == "no.such: has no place in the model"
    assert len(left) == len(model.state_dict()) + 1


def test_k_means_starts_all_codebooks_in_use() -> None:
    torch.manual_seed(0)
    model = dx.DualCodec(**SMALL)
    batches = [(0.1 * torch.randn(4, 1, 480 * 20), torch.randn(4, 160, 20)) for _ in range(4)]
    start_semantic(model, batches)
    start_acoustic(model, batches)
    model.eval()
    used = [set() for _ in range(3)]  # type: list[set[int]]
    for audio, features in batches:
        semantic, acoustic = model.encode(audio, semantic_repr=features)
        assert acoustic is not None
        for entries, codes in zip(used, torch.cat([semantic, acoustic], 1).unbind(1), strict=True):
            entries.update(codes.flatten().tolist())
    assert min(len(entries) for entries in used) >= 0.9 * 32


@pytest.mark.parametrize("average", [True, False], ids=["running means", "codebook loss"])
def test_unused_entries_get_rows_of_the_batch(average: bool) -> None:
    torch.manual_seed(0)
    model = dx.DualCodec(**SMALL)
    care = CodebookCare(model, memory_steps=2, fewest=0.1, average=average)
    optimizer = torch.optim.AdamW(model.parameters())
    weight = stages_of(model)[0].codebook.weight
    before = weight.detach().clone()
    codes = [torch.zeros(2, 10, dtype=torch.int64) for _ in range(3)]  # nothing but the first entry
    latents = [torch.randn(2, 8, 10) for _ in range(3)]
    for _ in range(3):
        care.update(codes, latents, optimizer)
        assert care.restarted == 0  # still remembered
    for _ in range(40):
        care.update(codes, latents, optimizer)
    assert not (weight == before).all(1)[1:].any()
    rows = latents[0].transpose(1, 2).reshape(-1, 8)
    assert all((row == rows).all(1).any() for row in weight[1:])
    if average:
        torch.testing.assert_close(weight[0], rows.mean(0), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(weight[0], before[0])


def test_batches_follow_seed_and_step(voices: list[Voice]) -> None:
    batches = Batches(voices, 3, 4800, seed=1)
    assert batches.at(7).shape == (3, 1, 4800)
    assert torch.equal(batches.at(7), Batches(voices, 3, 4800, seed=1).at(7))
    assert not torch.equal(batches.at(7), batches.at(8))
    assert not torch.equal(batches.at(7), Batches(voices, 3, 4800, seed=2).at(7))
    assert float(torch.stack([batches.at(i).abs().max() for i in range(20)]).max()) <= 1.0


def test_spectral_loss_sees_what_differs() -> None:
    torch.manual_seed(0)
    loss = SpectralLoss(24000, (128, 512), (8, 24))
    x = 0.1 * torch.randn(2, 1, 4800)
    assert all(float(part) == 0.0 for part in loss(x, x))
    mel, magnitude = loss(10 * x, x)
    assert float(mel) == pytest.approx(1.0, abs=0.02)  # a factor of ten, in log10
    assert 8 < float(magnitude) < 9.1
    # Above the highest band the mel part is deaf, the linear one is not.
    time = torch.arange(4800) / 24000
    high = x + 0.1 * torch.sin(2 * math.pi * 10000 * time)
    deaf = SpectralLoss(24000, (512,), (24,), highest_hz=6000)
    mel, magnitude = deaf(high, x)
    assert float(mel) < 0.01 and float(magnitude) > 0.05


def test_entropy() -> None:
    assert entropy_bits(torch.arange(256)) == pytest.approx(8.0)
    assert entropy_bits(torch.tensor([3, 3, 3])) == 0.0


def test_the_command_writes_a_model_that_loads(speech: Path, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "recipe.json"
    settings = recipe(steps=4, log_every=2).to_dict()
    config.write_text(json.dumps(settings))
    out = tmp_path / "run"
    assert cli.main(["train", "--config", str(config), "--data", str(speech), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    names = {path.name for path in out.iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "model.safetensors", "config.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    model = dx.DualCodec.from_pretrained(out)
    audio = torch.from_numpy(vowels("ai").samples)[None, None]
    codes = model.encode(audio)
    assert model.decode_from_codes(*codes).shape[-1] == codes[0].shape[-1] * 480
    statistics = load_file(out / "model.safetensors")
    torch.testing.assert_close(model.semantic_features(audio), given_features(statistics, audio))
    assert not torch.equal(statistics["features.mean"], torch.full((160,), -3.0))


def given_features(statistics: dict[str, torch.Tensor], audio: torch.Tensor) -> torch.Tensor:
    from dualcodec_ext.semantic import LogMelFeatures

    mel = LogMelFeatures(1)
    mel.set_statistics(statistics["features.mean"], statistics["features.variance"])
    return mel(audio)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "recipe: steps must be an integer from 1, got 0"),
        ({"optimizer": "sgd"}, "recipe: optimizer must be adamw or muon, got 'sgd'"),
        ({"way": "fast"}, "recipe: way must be one of auto, reference, ops, channels_last, got 'fast'"),
        ({"losses": {"loud": 1.0}}, "recipe: losses must be among .*, got loud"),
        ({"losses": {"envelope": 1.0}}, r"recipe: segment_frames less one must make 0\.4 s .*, got 10 - 1 \(0\.18 s\)"),
        ({"batch": 3, "workers": 2}, "recipe: workers must be 1 or 2 and divide batch=3, got 2"),
        ({"model": "huge"}, "recipe: model: DualCodecConfig.preset: name must be one of .*, got 'huge'"),
        ({"colour": 1}, "recipe: settings must be among .*, got colour"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DualCodecError, match=message):
        recipe(**changes)


def test_wrong_calls(tmp_path: Path, voices: list[Voice], speech: Path) -> None:
    with pytest.raises(DualCodecError, match="must be a folder with audio files below it"):
        load_voices(tmp_path, 24000)
    with pytest.raises(DualCodecError, match="semantic_dim=20 needs w2v-BERT's features: give --w2v"):
        train(recipe(model=SMALL | {"semantic_dim": 20}), speech, tmp_path / "out")
    with pytest.raises(DualCodecError, match="a voice must last longer than"):
        Batches(voices, 2, 24000 * 60, seed=0)
    trainer = Trainer(recipe(), voices)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(DualCodecError, match="must be a checkpoint of this recipe's model"):
        trainer.state.load(tmp_path / "checkpoint.pt")
