"""The model and the inputs that decode and encode are measured on, and what float64 makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualcodec_ext import testing
from dualcodec_ext.config import DualCodecConfig
from dualcodec_ext.reference import DualCodec, ResidualVectorQuantize
from dualcodec_ext.reference.ops import rvq_search_ref

from .correctness import CodesCheck, Error, WaveCheck, exact_math
from .peers.base import Task, with_state
from .program import ConvNeXt, Program, Quantizer, build_program

_F64, _F32 = torch.float64, torch.float32

# Beside a cut: four causal ConvNeXt blocks before and behind the semantic codebook see 48 frames back, the
# DAC about 5.
_CONTEXT_FRAMES = 64


def load_settings(preset: str, config: str | None) -> tuple[str, dict[str, Any]]:
    """A name and the settings of a preset or of a JSON file with `DualCodecConfig`'s fields."""
    if config is None:
        return preset, DualCodecConfig.preset(preset).to_dict()
    fields = json.loads(Path(config).read_text(encoding="utf-8"))
    return Path(config).stem, DualCodecConfig.from_dict(fields).to_dict()


_kept: dict[tuple[str, str], Any] = {}  # of the last settings: the model, and its state where it is wanted


def seeded(settings: Mapping[str, Any]) -> DualCodec:
    """`testing.seeded_model` on the CPU, not to be changed; that of the last settings is kept for the next run."""
    key = json.dumps(dict(settings), sort_keys=True), "model"
    if key not in _kept:
        _kept.clear()
        _kept[key] = testing.seeded_model(dict(settings))
    model: DualCodec = _kept[key]
    return model


def _seeded_state(settings: Mapping[str, Any], device: str) -> dict[str, Tensor]:
    model, key = seeded(settings), (json.dumps(dict(settings), sort_keys=True), device)
    if key not in _kept:
        _kept[key] = {name: value.to(device) for name, value in model.state_dict().items()}
    state: dict[str, Tensor] = _kept[key]
    return state


def make_task(
    kind: str,
    settings: Mapping[str, Any],
    seconds: float,
    threads: int,
    device: str,
    batch: int = 1,
    family: str = "",
) -> Task:
    """Seeded weights under which every activation is of order one and the codebooks are in use, and seeded
    inputs.

    Args:
        kind: "decode" or "encode".
        settings: all of a codec's settings.
        seconds: of audio, rounded to whole frames.
        threads, device: where it will run.
        batch: clips of `seconds` each.
        family: the backend that ours runs on, empty: the device's.
    """
    program = build_program(settings)
    state = _seeded_state(settings, device)
    frames = program.frames(seconds)
    generator = torch.Generator().manual_seed(1)

    def codes(quantizer: Quantizer) -> Tensor:
        return torch.randint(quantizer.entries, (batch, len(quantizer.dims), frames), generator=generator)

    if kind == "decode":
        inputs: tuple[Tensor, ...] = (codes(program.semantic_vq), codes(program.rvq))
    else:
        # Clips of speech take a second each; what is compared are the first and the last.
        speech = testing.make_speech(frames * program.hop_samples, min(batch, 2), sample_rate_hz=program.sample_rate_hz)
        audio = speech[torch.arange(batch) * 2 // batch]
        inputs = (audio, testing.make_features(frames, batch, dim=program.semantic_dim))
    return Task(kind, settings, program, state, tuple(x.to(device) for x in inputs), threads, device, family)


def compared_items(task: Task) -> tuple[int, ...] | None:
    """Of a batch the first and the last clip are compared; None: all there are."""
    batch = task.inputs[0].shape[0]
    return None if batch <= 2 else (0, batch - 1)


def _picked(task: Task) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The inputs that are compared, and what a check is told of them."""
    items = compared_items(task)
    if items is None:
        return task.inputs, {}
    return tuple(x[list(items)] for x in task.inputs), {"items": items, "batch": task.inputs[0].shape[0]}


def _reference(task: Task, dtype: torch.dtype) -> DualCodec:
    return with_state(lambda: DualCodec(**task.settings), task.state).to(device=task.device, dtype=dtype)


def check_windows(frames: int, limit: int) -> list[tuple[int, int, int, int]]:
    """Which frames to run in float64, and which of those to compare: (first, last, compare from, compare to).

    A long clip is compared at its two ends. The cut side gets more frames than the receptive field of either
    path.
    """
    if frames <= limit:
        return [(0, frames, 0, frames)]
    half = max(1, limit // 2)
    head = (0, min(frames, half + _CONTEXT_FRAMES), 0, half)
    return [head, (max(0, frames - half - _CONTEXT_FRAMES), frames, frames - half, frames)]


@torch.no_grad()
def decode_check(task: Task, dtype: torch.dtype, limit_s: float = 30.0) -> WaveCheck:
    """Float64 audio, and the error of the plain reference in `dtype`, which ours is held to."""
    hop, frames = task.program.hop_samples, task.inputs[0].shape[-1]
    inputs, told = _picked(task)
    exact, rounded = _reference(task, torch.float64), _reference(task, dtype)
    spans, wanted, plain = [], [], []
    # Centred decoders with odd strides return a few samples less than hop * frames.
    short = hop * frames - exact_length(task, frames)
    for first, last, start, stop in check_windows(frames, task.program.frames(limit_s)):
        codes = tuple(x[..., first:last] for x in inputs)
        stop_sample = hop * stop - (short if stop == frames else 0)
        spans.append((hop * start, stop_sample))
        kept = slice(hop * (start - first), stop_sample - hop * first)
        with exact_math():
            wanted.append(exact.decode_from_codes(*codes)[..., kept].cpu())
            plain.append(rounded.decode_from_codes(*codes)[..., kept].cpu())
    whole = torch.cat(wanted, -1)
    return WaveCheck(whole, Error.of(torch.cat(plain, -1), whole), tuple(spans), hop * frames - short, **told)


def exact_length(task: Task, frames: int) -> int:
    """Samples that decode returns."""
    steps = frames
    for layer in task.program.decoder:
        steps = layer.out_length(steps)
    return steps


@torch.no_grad()
def encode_check(task: Task, limit_s: float = 30.0) -> CodesCheck:
    """Float64 codes, their margins, and the margins below which float32 may choose otherwise.

    Those bounds are for a latent of twice the error that plain PyTorch's has in float32 (given float64's
    semantic codes).
    """
    program, hop = task.program, task.program.hop_samples
    inputs, told = _picked(task)
    exact, rounded = _reference(task, torch.float64), _reference(task, torch.float32)
    frames = task.inputs[1].shape[-1]
    spans: list[tuple[int, int]] = []
    parts: tuple[list[_Part], list[_Part]] = ([], [])
    for first, last, start, stop in check_windows(frames, program.frames(limit_s)):
        audio, features = inputs[0][..., first * hop : last * hop], inputs[1][..., first:last]
        kept = slice(start - first, stop - first)
        with exact_math():
            found = _search_both(program, exact, rounded, audio, features)
        for part, new in zip(parts, found, strict=True):
            part.append(new.frames(kept))
        spans.append((start, stop))
    blocks = [x for x in program.semantic_decoder if isinstance(x, ConvNeXt)]
    reach = (sum(x.right for x in blocks), sum(x.left for x in blocks))

    def joined(name: str) -> tuple[Tensor, ...]:
        return tuple(torch.cat([getattr(piece, name) for piece in pieces], -1).cpu() for pieces in parts)

    return CodesCheck(joined("codes"), joined("margins"), joined("bounds"), reach, tuple(spans), frames, **told)


@dataclass(frozen=True)
class _Part:
    codes: Tensor  # [B, q, F]
    margins: Tensor
    bounds: Tensor
    quantized: Tensor  # [B, C, F]

    def frames(self, kept: slice) -> _Part:
        return _Part(*(x[..., kept] for x in (self.codes, self.margins, self.bounds, self.quantized)))


def _search_both(
    program: Program, exact: DualCodec, rounded: DualCodec, audio: Tensor, features: Tensor
) -> tuple[_Part, _Part]:
    """The semantic and the acoustic part."""
    models = ((exact, _F64), (rounded, _F32))
    latents = [model.convnext_encoder(features.to(dtype)) for model, dtype in models]
    semantic = _search(exact.semantic_vq, *latents)
    for i, (model, dtype) in enumerate(models):
        decoded = semantic.quantized.to(dtype)
        if program.semantic_decoder:
            decoded = model.convnext_decoder(decoded)
        latents[i] = model.dac.encoder(audio.to(dtype)) - decoded
    return semantic, _search(exact.dac.quantizer, *latents)


def _search(rvq: ResidualVectorQuantize, exact: Tensor, rounded: Tensor) -> _Part:
    tensors = rvq.op_tensors(torch.float64)
    codes, quantized, margins = rvq_search_ref(exact, **tensors, return_quantized=True, return_margin=True)
    assert quantized is not None and margins is not None
    error = ((rounded.double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
    bounds = testing.rvq_margin_bound(exact, **tensors, relative_error=2 * error + 2.0**-22)
    return _Part(codes, margins, bounds, quantized)
