"""Less look-ahead than the layers need: whatever the cut, with errors that fall."""

from __future__ import annotations

import pytest
import torch
from test_streaming import Session, alone, codes, model, no_gradients

import dualcodec_ext as dx

__all__ = ["no_gradients"]  # a fixture


@pytest.mark.parametrize("name", ["tiny", "look-ahead", "centred blocks", "rate 7"])
def test_less_lookahead(name: str) -> None:
    semantic, acoustic = codes(name, 40)
    whole = alone(name, semantic, acoustic)
    needed = dx.StreamingDecoder(model(name)).lookahead_frames
    errors = []
    for k in range(needed + 1):
        decoder = dx.StreamingDecoder(model(name), lookahead=k)
        assert decoder.lookahead_frames <= k
        hop, parts = decoder._hop, []
        for at in range(40):
            parts.append(decoder.step(semantic[..., at : at + 1], acoustic[..., at : at + 1]))
            assert sum(part.shape[2] for part in parts) >= max(0, at + 1 - k) * hop
        audio = torch.cat([*parts, decoder.flush()], -1)
        assert torch.equal(audio, alone(name, semantic, acoustic, lookahead=k)), "whatever the cut"
        if k == 0:  # nothing is held back, so the few samples that a centred decoder loses at the end are out
            assert audio.shape[2] == 40 * hop
            audio = audio[..., : whole.shape[2]]
        assert audio.shape == whole.shape
        errors.append(float((audio - whole).square().mean().sqrt()))
    assert errors[-1] == 0 < errors[0]
    assert errors[needed // 2] < errors[0]


def test_less_lookahead_in_slots() -> None:
    name, batch = "tiny", 3
    session = Session(name, batch, None)
    session.decoder = dx.StreamingDecoder(model(name), batch, lookahead=3)
    for mask in ([True] * 3, [True, False, True], [False, True, True], [True] * 3):
        session.step(2, mask)
    session.flush([False, True, False])
    session.step(5, [True] * 3)
    session.flush([True] * 3)
    for semantic, acoustic, audio in session.clips:
        assert torch.equal(audio, alone(name, semantic, acoustic, lookahead=3))
