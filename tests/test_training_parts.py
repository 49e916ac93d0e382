"""What a training step is made of: its rate, clipping, each loss, the codebooks' care, the adversary, checkpoints."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import SMALL, recipe
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext._cli.train import weights_of
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext._training.codebooks import CodebookCare, stages_of
from dualcodec_ext._training.data import Batches, Voice
from dualcodec_ext._training.discriminators import Discriminators, PeriodDiscriminator, SpectrumDiscriminator
from dualcodec_ext._training.forward import Output
from dualcodec_ext._training.state import State
from dualcodec_ext.errors import DualCodecError
from dualcodec_ext.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
JUDGES = {"periods": [2, 3], "windows": [256], "width": 4}
# What a recipe that names no factors gives each part of the loss.
FACTORS = {
    "mel": 15.0,
    "magnitude": 1.0,
    "waveform": 1.0,
    "commitment": 0.25,
    "codebook": 1.0,
    "adversarial": 1.0,
    "feature": 2.0,
}
HEARING = {"disturbance": 3.0, "envelope": 2.0}  # 0 where a recipe does not name them


def made(**changes: Any) -> Trainer:
    """A trainer on one generated voice, and batches smaller than those of test_training."""
    samples = np.round(vowels("aeiou").samples * 32767).astype(np.int16)
    return Trainer(
        recipe(**{"batch": 2, "segment_frames": 6, "way": "reference", **changes}), [Voice("one", samples, 1.0)]
    )


def gradient_norm(trainer: Trainer) -> float:
    """Of what the last step left, which is what its optimiser took."""
    gradients = [p.grad for p in trainer.state.model.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    state = State(recipe(steps=100, warmup_steps=10, learning_rate=1e-2, final_learning_rate=1e-3), torch.device("cpu"))
    rates = []
    for state.step in range(101):
        rates.append(state.learning_rate())
    assert rates[0] == pytest.approx(1e-3) and rates[4] == pytest.approx(5e-3)
    assert rates[9] == pytest.approx(1e-2) and rates[10] == pytest.approx(1e-2)
    assert rates[55] == pytest.approx((1e-2 + 1e-3) / 2)  # half of the cosine
    assert rates[100] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_step_takes_the_rate_of_its_number() -> None:
    trainer = made(optimizer="muon", learning_rate=1e-2, warmup_steps=4)
    for step in range(2):
        trainer.step()
        rates = {group["lr"] for optimizer in trainer.state.optimizers() for group in optimizer.param_groups}
        assert rates == {1e-2 * (step + 1) / 4} and len(trainer.state.optimizers()) == 2


def test_the_gradient_is_clipped() -> None:
    trainer = made(clip=0.5)
    found = trainer.step()["gradient_norm"]
    assert found > 1  # what is logged is the size before
    assert gradient_norm(trainer) == pytest.approx(0.5, rel=1e-3)
    whole = made(clip=0.0)
    assert whole.step()["gradient_norm"] == pytest.approx(found)
    assert gradient_norm(whole) == pytest.approx(found, rel=1e-3)


def test_the_loss_holds_every_part() -> None:
    settings = {"adversary_from": 0, "adversary": JUDGES, "codebooks": "gradient", "segment_frames": 24}
    factors = FACTORS | HEARING
    logged = made(losses=HEARING, **settings).step()
    assert all(logged[name] > 0 for name in factors)
    assert logged["loss"] == pytest.approx(sum(factor * logged[name] for name, factor in factors.items()))
    logged = made(**settings).step()
    assert not set(HEARING) & set(logged)
    assert logged["loss"] == pytest.approx(sum(factor * logged[name] for name, factor in FACTORS.items()))


@pytest.mark.parametrize("part", FACTORS | HEARING)
def test_each_part_alone_moves_the_model(part: str) -> None:
    only = {name: float(name == part) for name in FACTORS | HEARING}
    frames = 24 if part in HEARING else 6
    trainer = made(
        losses=only, adversary_from=0, adversary=JUDGES, codebooks="gradient", clip=0.0, segment_frames=frames
    )
    trainer.step()
    model = trainer.state.model
    parts = {"encoder": model.dac.encoder, "decoder": model.dac.decoder, "codebook": stages_of(model)[0].codebook}
    reached = {
        name
        for name, module in parts.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    }
    assert reached == {"commitment": {"encoder"}, "codebook": {"codebook"}}.get(part, {"encoder", "decoder"})


def test_the_average_trails_and_is_what_is_written(tmp_path: Path) -> None:
    trainer = made(ema_decay=0.2, learning_rate=1e-2, warmup_steps=1)
    state, name = trainer.state, "dac.decoder.model.0.conv.weight_v"
    wanted = state.model.state_dict()[name].clone()
    for step in (1, 2, 3):
        trainer.step()
        keep = min(0.2, (1 + step) / (10 + step))  # early on it follows sooner
        wanted = keep * wanted + (1 - keep) * state.model.state_dict()[name]
    torch.testing.assert_close(state.average[name], wanted)
    assert float((wanted - state.model.state_dict()[name]).abs().max()) > 1e-4
    assert torch.equal(state.averaged_model().state_dict()[name], state.average[name])
    assert torch.equal(load_file(state.export(tmp_path))[name], state.average[name].half())


def test_weights_say_for_how_many_steps_they_were_trained(tmp_path: Path) -> None:
    trainer = made()
    trainer.state.steps_before = 7
    trainer.step()
    assert weights_of(None, str(trainer.state.export(tmp_path)))[1] == 8
    trainer.state.save(tmp_path / "checkpoint.pt")
    resumed = made()
    resumed.state.load(tmp_path / "checkpoint.pt")
    assert (resumed.state.steps_before, resumed.state.step) == (7, 1)
    assert weights_of("tiny", None)[1] >= 17500  # those that --init takes


class Watched:
    """A forward that notes how many codebooks it was asked for."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.counts = forward, []  # type: ignore[var-annotated]

    def draw(self, batch: int) -> Tensor:
        return self.forward.draw(batch)

    def __call__(self, audio: Tensor, features: Tensor, counts: Tensor, quantize: bool = True) -> Output:
        self.counts += counts.tolist()
        return self.forward(audio, features, counts, quantize)


def counts_of(steps: int, **changes: Any) -> list[int]:
    trainer = made(**changes)
    trainer.forward = watched = Watched(trainer.forward)  # type: ignore[assignment]
    for _ in range(steps):
        trainer.step()
    return watched.counts


def test_steps_draw_how_many_codebooks_are_used() -> None:
    assert set(counts_of(2, quantizer_dropout=0.0)) == {SMALL["n_codebooks"]}
    assert len(set(counts_of(4, quantizer_dropout=1.0))) > 1
    assert set(counts_of(2, quantizer_dropout=0.0, bypass=1.0)) == {0}
    assert set(counts_of(4, quantizer_dropout=1.0, count_odds=[0, 1, 0])) == {1}


def test_draws_follow_dropout_and_bypass() -> None:
    torch.manual_seed(0)
    forward = made(quantizer_dropout=0.5, bypass=0.25).forward
    drawn = torch.stack([forward.draw(1000) for _ in range(400)])
    without = (drawn == 0).all(1)
    assert 0.2 < float(without.float().mean()) < 0.3
    kept = drawn[~without]
    assert kept.unique().tolist() == [0, 1, 2]
    assert float((kept == 2).float().mean()) == pytest.approx(0.5 + 0.5 / 3, abs=0.01)  # half drawn, evenly

    forward = made(quantizer_dropout=0.5, count_odds=[1, 3, 0]).forward
    drawn = torch.stack([forward.draw(1000) for _ in range(100)])
    shares = [float((drawn == count).float().mean()) for count in range(3)]
    assert shares == pytest.approx([1 / 8, 3 / 8, 1 / 2], abs=0.01)


def test_codebooks_are_looked_after() -> None:
    """The only thing that moves codebooks of running means, whose entries it also revives."""
    trainer = made(memory_steps=2, learning_rate=0.0, final_learning_rate=0.0)
    books = [stage.codebook.weight for stage in stages_of(trainer.state.model)]
    before = [book.detach().clone() for book in books]
    first = trainer.step()
    assert first["restarted"] == 0 and first["entries_in_use"] == 1
    for book, old in zip(books, before, strict=True):
        hit = (book != old).any(1)
        assert 0 < int(hit.sum()) <= 12  # as many as there were frames
    assert sum(trainer.step()["restarted"] for _ in range(5)) > 0


def test_a_revived_row_has_no_past() -> None:
    torch.manual_seed(0)
    model = dx.DualCodec(**SMALL)
    weight = stages_of(model)[0].codebook.weight
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    care = CodebookCare(model, memory_steps=2, fewest=0.1, average=False)
    codes = torch.arange(16).repeat(1, 4)  # the upper half is never chosen, and there are rows enough for it
    moments = {name: optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    for _ in range(4):
        care.update([codes], [torch.randn(1, 8, 64)], optimizer)
    assert care.restarted == 16
    for name, old in moments.items():
        new = optimizer.state[weight][name]
        assert torch.equal(new[:16], old[:16]) and bool(old.all()) and not new[16:].any()


def test_voices_are_drawn_by_their_weight() -> None:
    voices = [
        Voice(str(level), np.full(5000, level, dtype=np.int16), weight) for level, weight in ((1000, 9), (9000, 1))
    ]
    batches = Batches(voices, 500, 480, seed=0, augment=False)
    loud = (batches.at(0).mean((1, 2)) * 32767).round() == 9000
    assert 0.05 < float(loud.float().mean()) < 0.15


@pytest.mark.parametrize("period", [2, 3, 5])
def test_a_period_is_a_rows_length(period: int) -> None:
    judge, seen = PeriodDiscriminator(period, 4), []
    judge.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    judge(torch.arange(60.0).reshape(1, 1, -1))
    judge(torch.zeros(2, 1, 61))  # its last row is filled up
    assert torch.equal(seen[0], torch.arange(60.0).reshape(1, 1, 60 // period, period))
    assert seen[1].shape == (2, 1, -(-61 // period), period)


def test_discriminators_are_those_of_the_recipe() -> None:
    def sizes(judges: Discriminators | None) -> tuple[list[int], list[int], int]:
        assert judges is not None
        periods = [judge.period for judge in judges.members if isinstance(judge, PeriodDiscriminator)]
        windows = [judge.window for judge in judges.members if isinstance(judge, SpectrumDiscriminator)]
        return periods, windows, judges.members[0].layers[0].out_channels  # type: ignore[index, union-attr, return-value]

    assert sizes(Discriminators()) == ([2, 3, 5, 7, 11], [512, 1024, 2048], 16)
    state = made(adversary_from=3, adversary=JUDGES | {"learning_rate": 0.125}).state
    assert sizes(state.discriminators) == ([2, 3], [256], 4)
    assert state.adversary_optimizer is not None and state.adversary_optimizer.param_groups[0]["lr"] == 0.125
    assert made().state.discriminators is None


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}], ids=["adamw", "muon"])
def test_the_adversary_goes_on_where_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = changes | {"adversary_from": 1, "adversary": JUDGES}
    one, two = made(**settings), made(**settings)
    for _ in range(3):
        one.step()
    one.state.save(tmp_path / "checkpoint.pt")
    two.state.load(tmp_path / "checkpoint.pt")
    for _ in range(2):
        assert one.step() == two.step()
    for a, b in ((one.state.discriminators, two.state.discriminators), (one.state.model, two.state.model)):
        assert a is not None and b is not None
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("what", ["checkpoint.pt", "model.safetensors"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, what: str) -> None:
    state = State(recipe(), torch.device("cpu"))

    def write() -> None:
        state.save(tmp_path / what) if what == "checkpoint.pt" else state.export(tmp_path)

    write()
    before = (tmp_path / what).read_bytes()
    assert len(before) > 20000
    state.step = 1
    with pytest.raises((DualCodecError, OSError)):
        with_files_of_at_most(10000, write)
    assert (tmp_path / what).read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    write()
    assert (tmp_path / what).read_bytes() != before


def with_files_of_at_most(size: int, call: Callable[[], None]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
