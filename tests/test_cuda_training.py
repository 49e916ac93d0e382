"""Training on a GPU: it learns through the package's ops there, and a run goes on from its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import DEVICE, needs_device

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext._training.data import Voice
from dualcodec_ext.training import Recipe, Trainer

pytestmark = needs_device
STEPS = 15
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "steps": STEPS,
    "batch": 4,
    "segment_frames": 10,
    "warmup_steps": 5,
    "windows": [128, 512],
    "bands": [8, 24],
    "start_batches": 12,
}
JUDGES = {"periods": [2, 3], "windows": [256], "width": 4}


def trainer(**changes: Any) -> Trainer:
    samples = (testing.make_speech(3 * 24000, 1)[0, 0] * 32767).clamp(-32767, 32767).round().numpy()
    return Trainer(Recipe.from_dict(SETTINGS | changes), [Voice("one", samples.astype(np.int16), 1.0)], DEVICE)


def test_the_loss_falls() -> None:
    made = trainer()
    made.start()
    curve = [made.step()["loss"] for _ in range(STEPS)]
    assert made.forward.way == "ops" and {p.device.type for p in made.state.model.parameters()} == {DEVICE}
    assert all(map(math.isfinite, curve)) and np.mean(curve[-5:]) < 0.9 * np.mean(curve[:5])


def test_a_checkpoint_goes_on_and_an_export_loads(tmp_path: Path) -> None:
    """With adversary and Muon, whose states move too. A GPU's sums may come in another order."""
    pytest.importorskip("safetensors")
    settings = {"adversary_from": 1, "adversary": JUDGES, "optimizer": "muon"}
    one, two = trainer(**settings), trainer(**settings)
    one.start()
    for _ in range(3):
        one.step()
    one.state.save(tmp_path / "checkpoint.pt")
    two.state.load(tmp_path / "checkpoint.pt")
    found, wanted = two.step(), one.step()
    assert two.state.step == 4 and found.keys() == wanted.keys() >= {"discriminator", "feature"}
    for name in ("loss", "mel", "discriminator", "feature"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-2), name
    one.state.export(tmp_path)
    model = dx.DualCodec.from_pretrained(tmp_path).to(DEVICE)
    audio = testing.make_speech(24000, 2).to(DEVICE)
    codes = model.encode(audio)
    decoded = model.decode_from_codes(*codes)
    assert decoded.device.type == DEVICE and bool(decoded.isfinite().all()) and decoded.shape == audio.shape
