"""What speech is scored by: STOI and PESQ where their packages are, and the means that validation logs."""

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
