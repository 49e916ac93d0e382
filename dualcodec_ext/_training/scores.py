"""How well a model's speech comes back: STOI, wide-band PESQ, and what its codebooks carry."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..code_use import entropy_bits
from ..semantic import resample

_SCORE_RATE_HZ = 16000
SHORTEST_S = 0.5  # STOI needs 0.4 s of speech, PESQ a quarter


def missing_scorers() -> list[str]:
    """Return which of the packages that score speech are not installed."""
    return [name for name in ("pystoi", "pesq") if importlib.util.find_spec(name) is None]


def speech_scores(clean: Tensor, decoded: Tensor, rate_hz: int) -> dict[str, float]:
    """Compare decoded speech with what was encoded.

    Args:
        clean: [S] float.
        decoded: [S] float.
        rate_hz: of both.

    Returns:
        stoi (the plain form) and pesq (wide band), both at 16 kHz; those whose package (pystoi, pesq) is installed,
        and for which there is speech enough.
    """
    pair = [resample(x.to(torch.float32), rate_hz, _SCORE_RATE_HZ).numpy() for x in (clean.cpu(), decoded.cpu())]
    found: dict[str, float] = {}
    if importlib.util.find_spec("pystoi"):
        from pystoi import stoi

        with warnings.catch_warnings(), contextlib.suppress(RuntimeWarning):
            # Too little is left without the pauses: what it gives then is no score.
            warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
            found["stoi"] = float(stoi(pair[0], pair[1], _SCORE_RATE_HZ, extended=False))
    if importlib.util.find_spec("pesq"):
        from pesq import PesqError, pesq

        with contextlib.suppress(PesqError):  # no utterance found in it
            found["pesq"] = float(pesq(_SCORE_RATE_HZ, pair[0], pair[1], "wb"))
    return found


@torch.no_grad()
def score(
    model: reference.DualCodec,
    features: Callable[[Tensor], Tensor],
    clips: Sequence[Tensor],
    quantizers: Iterable[int] | None = None,
) -> dict[str, Any]:
    """Score a model on clips.

    Args:
        model: in eval mode.
        features: its front end.
        clips: [1, 1, S] each, at the model's rate.
        quantizers: how many codebooks to use, the semantic one included (None: 1, 4 and all).

    Returns:
        Means over the clips by number of codebooks: `stoi_1`, `pesq_1`, ...; and `entropy_bits`, per codebook.
    """
    most = 1 + model.dac.n_codebooks
    counts = list(quantizers or (1, min(4, most), most))
    found: dict[str, list[float]] = {}
    codes = [[] for _ in range(most)]  # type: list[list[Tensor]]
    for clip in clips:
        clip = clip.to(next(model.parameters()))
        semantic, acoustic = model.encode(clip, sample_rate=_rate(model), semantic_repr=features(clip).to(clip))
        assert acoustic is not None
        for book, chosen in zip(codes, torch.cat([semantic, acoustic], 1)[0], strict=True):
            book.append(chosen)
        for count in counts:
            decoded = model.decode_from_codes(semantic, acoustic[:, : count - 1] if count > 1 else None)
            samples = min(clip.shape[-1], decoded.shape[-1])  # w2v-BERT's features may come a frame short
            for name, value in speech_scores(clip[0, 0, :samples], decoded[0, 0, :samples], _rate(model)).items():
                found.setdefault(f"{name}_{count}", []).append(value)
    scores: dict[str, Any] = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    scores["entropy_bits"] = [round(entropy_bits(torch.cat(book).cpu()), 2) for book in codes]
    return scores


def _rate(model: reference.DualCodec) -> int:
    return int(model.settings["sample_rate"])
