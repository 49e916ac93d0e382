"""Pictures of a run: its curves, and a clip's spectrograms before and after."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomic


def can_draw() -> bool:
    """Return whether matplotlib is installed, which the other functions need."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw a run's losses and scores over its steps.

    Args:
        lines: of its log.
        path: PNG to write.

    Returns:
        Whether it was drawn: nothing may have been logged.
    """
    losses = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "validation" in line]
    if not losses:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = ("loss", "mel", "magnitude", "waveform", "disturbance", "envelope", "commitment", "feature", "adversarial")
    names = [name for name in losses[-1] if name in parts]
    for name in names:
        own = [line for line in losses if name in line]
        left.plot([line["step"] for line in own], [line[name] for line in own], label=name, linewidth=0.8)
    left.set(xlabel="step", yscale="log", title="training losses")
    left.legend()
    for name in sorted({name for line in scores for name in line["validation"] if name[:4] in ("stoi", "pesq")}):
        own = [line for line in scores if name in line["validation"]]
        right.plot([line["step"] for line in own], [line["validation"][name] for line in own], label=name, marker=".")
    right.set(xlabel="step", title="validation (name_codebooks)")
    if right.lines:
        right.legend()
    _write(figure, path)
    return True


def draw_spectrograms(before: Tensor, after: Tensor, rate_hz: int, path: Path) -> None:
    """Draw the spectrograms of a recording [S] and of what came back [S], one above the other.

    Args:
        rate_hz: of both.
        path: picture to write, of the kind that its suffix names.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, wave, title in zip(panels, (before, after), ("in", "out"), strict=True):
        window = 1024
        padded = torch.nn.functional.pad(wave.detach().float().cpu(), (window // 2, window // 2))
        frames = padded.unfold(-1, window, window // 4) * torch.hann_window(window)
        level_db = 20 * torch.fft.rfft(frames).abs().clamp(min=1e-4).log10()
        extent = (0, len(wave) / rate_hz, 0, rate_hz / 2000)
        panel.imshow(level_db.t().numpy(), origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=40)
        panel.set(title=title, ylabel="kHz")
    panels[-1].set(xlabel="s")
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format=path.suffix[1:].lower())
    write_atomic(path, picture.getvalue())
