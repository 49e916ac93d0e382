"""What speech is scored by: STOI and PESQ where their packages are, the means that validation logs, and the losses that
follow the two scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_training import SMALL
from torch import Tensor

import dualcodec_ext as dx
from dualcodec_ext._cli.voice import vowels
from dualcodec_ext._training import scores
from dualcodec_ext._training.perception import DisturbanceLoss, EnvelopeLoss
from dualcodec_ext._training.scores import score, speech_scores


@pytest.fixture(scope="module")
def voice() -> Tensor:
    """Four seconds with pauses, [S] at 24 kHz."""
    samples = vowels("aeiou" * 2).samples[: 4 * 24000].copy()
    samples[40000:46000] *= 1e-3
    return torch.from_numpy(samples)


def test_stoi(voice: Tensor) -> None:
    pytest.importorskip("pystoi")
    noise = float(voice.square().mean().sqrt()) * torch.randn(voice.shape, generator=torch.Generator().manual_seed(0))
    found = [speech_scores(voice, other, 24000)["stoi"] for other in (voice, voice + noise / 4, noise)]
    assert found[0] == pytest.approx(1.0, abs=1e-4)
    assert found[0] > found[1] > found[2] and found[2] < 0.3


def test_pesq(voice: Tensor) -> None:
    pytest.importorskip("pesq")
    noise = 0.05 * torch.randn(voice.shape, generator=torch.Generator().manual_seed(0))
    clean, noisy = (speech_scores(voice, other, 24000)["pesq"] for other in (voice, voice + noise))
    assert clean == pytest.approx(4.64, abs=0.01)  # the wide-band form's highest
    assert noisy < 2.5


def damaged(voice: Tensor) -> list[Tensor]:
    """Ever worse forms of a voice, [1, 1, S] each: noise beside it, by level."""
    noise = torch.randn(voice.shape, generator=torch.Generator().manual_seed(0))
    return [(voice + level * noise)[None, None] for level in (0.0, 0.003, 0.01, 0.03, 0.1)]


def test_the_envelope_loss_is_what_stoi_lacks(voice: Tensor) -> None:
    pytest.importorskip("pystoi")
    loss = EnvelopeLoss(24000)
    for form in damaged(voice):
        wanted = speech_scores(voice, form[0, 0], 24000)["stoi"]
        assert 1 - float(loss(form, voice[None, None])) == pytest.approx(wanted, abs=0.02)


def test_the_disturbance_grows_as_pesq_falls(voice: Tensor) -> None:
    pytest.importorskip("pesq")
    loss, forms = DisturbanceLoss(24000), damaged(voice)
    losses = [float(loss(form, voice[None, None])) for form in forms]
    assert 0 <= losses[0] < 1e-3 and losses == sorted(losses)
    heard = [speech_scores(voice, form[0, 0], 24000)["pesq"] for form in forms]
    assert heard == sorted(heard, reverse=True)


def test_what_is_added_disturbs_more_than_what_is_missing() -> None:
    """A band that one of two signals lacks, both ways round."""
    time = torch.arange(24000) / 24000
    low, high = (0.1 * torch.sin(2 * torch.pi * hz * time)[None, None] for hz in (500, 2500))
    loss = DisturbanceLoss(24000)
    missing, added = float(loss(low, low + high)), float(loss(low + high, low))
    assert added > 2 * missing > 0
    # A little louder is masked; what lies above 8 kHz is not looked at.
    beyond = low + 0.1 * torch.sin(2 * torch.pi * 10000 * time)
    assert max(float(loss(1.2 * low, low)), float(loss(beyond, low))) < 0.05 * missing


@pytest.mark.parametrize("kind", [DisturbanceLoss, EnvelopeLoss])
@pytest.mark.parametrize("samples", [300, 9000, 12000])
def test_silence_and_short_clips_have_gradients(kind: type[DisturbanceLoss | EnvelopeLoss], samples: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for level, target_level in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)):
        x = (level * torch.randn(2, 1, samples, generator=generator)).requires_grad_()
        target = target_level * torch.randn(2, 1, samples, generator=generator)
        loss = kind(24000)(x, target)
        loss.backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(loss))
        if samples == 12000 and level and target_level:
            assert bool(x.grad.any())


def test_a_batchs_loss_is_the_mean_of_its_items(voice: Tensor) -> None:
    clips = torch.stack([voice[:24000], 0.1 * voice[24000:48000]])[:, None]
    noisy = clips + 0.01 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))
    for kind in (DisturbanceLoss, EnvelopeLoss):
        loss = kind(24000)
        alone = [float(loss(noisy[i : i + 1], clips[i : i + 1])) for i in range(2)]
        assert float(loss(noisy, clips)) == pytest.approx(float(np.mean(alone)), rel=1e-5)


def test_what_comes_out_of_silence_does_not_decide_a_step(voice: Tensor) -> None:
    """The slope at next to nothing, beside that at speech."""
    target = voice[None, None, :17280]
    for kind in (DisturbanceLoss, EnvelopeLoss):
        slopes = []
        for level in (1e-7, 0.1):
            x = level * torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
            x.requires_grad_()
            kind(24000)(x, target).backward()
            assert x.grad is not None
            slopes.append(float(x.grad.norm()))
        assert slopes[0] < 1000 * slopes[1], kind


def test_means_go_by_number_of_codebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored at the clip's own length, against what that many codebooks decode to."""
    torch.manual_seed(0)
    model = dx.DualCodec(**SMALL | {"n_codebooks": 5}).eval()
    clips = [0.1 * torch.randn(1, 1, samples) for samples in (4800, 5001)]
    features = [torch.randn(1, 160, -(-clip.shape[-1] // 480)) for clip in clips]
    compared: list[tuple[Tensor, Tensor]] = []

    def listen(clean: Tensor, decoded: Tensor, rate_hz: int) -> dict[str, float]:
        assert rate_hz == 24000 and clean.shape == decoded.shape
        compared.append((clean, decoded))
        return {"stoi": len(compared) / 100}

    monkeypatch.setattr(scores, "speech_scores", listen)
    waiting = iter(features)
    found: dict[str, Any] = score(model, lambda clip: next(waiting), clips)
    assert found.keys() == {"stoi_1", "stoi_4", "stoi_6", "entropy_bits"}
    assert [found[f"stoi_{n}"] for n in (1, 4, 6)] == pytest.approx([0.025, 0.035, 0.045])
    assert len(found["entropy_bits"]) == 6
    for i, (clip, given) in enumerate(zip(clips, features, strict=True)):
        semantic, acoustic = model.encode(clip, semantic_repr=given)
        assert acoustic is not None
        for (clean, decoded), count in zip(compared[3 * i : 3 * i + 3], (1, 4, 6), strict=True):
            wanted = model.decode_from_codes(semantic, acoustic[:, : count - 1] if count > 1 else None)
            assert torch.equal(clean, clip[0, 0])
            np.testing.assert_array_equal(decoded, wanted[0, 0, : clip.shape[-1]])
