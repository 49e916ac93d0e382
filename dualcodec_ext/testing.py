"""What tests and benches share: seeded weights, inputs, poison, and the comparers of `_compare`."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from . import reference
from ._compare import (
    CodeReport,
    ErrorReport,
    assert_close,
    assert_close_to_f64,
    compare_codes,
    one_ulp,
)
from .reference import ops as ref_ops

__all__ = [
    "TINY",
    "CodeReport",
    "ErrorReport",
    "assert_close",
    "assert_close_to_f64",
    "compare_codes",
    "make_features",
    "make_inputs",
    "make_speech",
    "one_ulp",
    "poison_past_lengths",
    "poisoned_memory",
    "rvq_margin_bound",
    "seed_model",
    "seeded_model",
    "strided_copies",
]

# What a random net needs so that activations keep to order one. A unit's branch is small beside its input;
# what follows three units takes their growth back; the last convolution stays where tanh is not flat.
_BRANCH_GAIN = 0.5
_AFTER_UNITS_GAIN = 0.65
_WAVEFORM_GAIN = 0.15
_FIRST_GAIN = 6.0  # speech is far quieter than 1
_STAGE_GAIN = 0.3

# A small model with every kind of layer, two odd rates, and code spaces of unequal width.
TINY: dict[str, Any] = {
    "encoder_dim": 8,
    "encoder_rates": (2, 3, 5),
    "decoder_rates": (5, 3, 2),
    "decoder_dim": 32,
    "n_codebooks": 3,
    "codebook_size": 33,
    "codebook_dim": (8, 5, 8),
    "semantic_codebook_size": 130,
    "convnext_dim": 24,
    "convnext_layers": 2,
    "convnext_intermediate_dim": 48,
    "semantic_dim": 20,
    "sample_rate": 24000,
    "is_causal": True,
}


def _generator(seed: int, name: str) -> torch.Generator:
    # Seeded by name, so that a parameter's values depend neither on the layers before it nor on their order.
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))


@torch.no_grad()
def seed_model(model: nn.Module, seed: int = 0) -> None:
    """Give a codec weights that keep every activation of order one, use the codebooks and do not saturate
    tanh.

    Args:
        model: `reference.DualCodec`, `DualCodec` or the PyPI package's; equal seeds give equal parameters.
        seed: of the values.
    """
    gains: dict[str, float] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "ResidualUnit":
            gains[f"{path}.block.3"] = gains[f"{path}.block.3.conv"] = _BRANCH_GAIN
        elif kind == "EncoderBlock":
            gains[f"{path}.block.4"] = gains[f"{path}.block.4.conv"] = _AFTER_UNITS_GAIN
        elif kind == "DecoderBlock":
            for tail in ("", ".conv", ".conv.conv"):
                gains[f"{path}.block.1{tail}"] = _AFTER_UNITS_GAIN
        elif kind == "Encoder":
            gains[f"{path}.block.0"] = gains[f"{path}.block.0.conv"] = _FIRST_GAIN
        elif kind == "Decoder":
            last = len(list(module.get_submodule("model"))) - 2
            gains[f"{path}.model.{last}"] = gains[f"{path}.model.{last}.conv"] = _WAVEFORM_GAIN
        elif kind == "VectorQuantize" and "semantic" not in path:
            gains[f"{path}.out_proj"] = _STAGE_GAIN
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        noise = torch.randn(parameter.shape, generator=_generator(seed, name))
        if leaf == "alpha":
            value = (0.3 * noise).exp()
        elif leaf == "bias":
            value = 0.1 * noise
        elif leaf == "weight_g":
            value = gains.get(path, 1.0) * (1 + 0.1 * noise) * _unit_gain(owner)
        elif isinstance(owner, nn.LayerNorm):
            value = 1 + 0.1 * noise
        elif isinstance(owner, nn.Embedding):
            value = noise
        elif leaf == "weight_v":
            # Snake's output has a mean; weights that sum to zero keep it from growing into a constant that
            # hides the signal.
            centre = noise.mean((1, 2), keepdim=True) if parameter.shape[1] > 16 else 0.0
            value = noise - centre
        else:  # depthwise and linear weights
            value = noise / math.sqrt(math.prod(parameter.shape[1:]))
        parameter.copy_(value)


def _unit_gain(owner: nn.Module) -> float:
    """Return the |v| for which a convolution's output has its input's mean square."""
    if not isinstance(owner, nn.ConvTranspose1d | reference.WNConvTranspose1d):
        return 1.0
    # Here g is per input channel: each output adds two taps of every input channel.
    weight: Tensor = owner.get_parameter("weight_v")  # [Cin, Cout, taps]
    return math.sqrt(weight.shape[1] * weight.shape[2] / (2 * weight.shape[0]))


def seeded_model(settings: dict[str, Any] | None = None, seed: int = 0) -> reference.DualCodec:
    """Return a reference model in eval mode with `seed_model`'s weights; settings None: `TINY`."""
    model = reference.DualCodec(**(TINY if settings is None else settings)).eval()
    seed_model(model, seed)
    return model


def make_speech(samples: int, batch: int = 1, sample_rate_hz: int = 24000, seed: int = 0) -> Tensor:
    """Return speech-like audio: gliding voiced harmonics under moving formants, pauses, and some breath.

    Args:
        samples: per item.

    Returns:
        [batch, 1, samples] float32, about 0.1 RMS, at most 0.9.
    """
    time = torch.arange(samples, dtype=torch.float64) / sample_rate_hz
    items = []
    for b in range(batch):
        gen = torch.Generator().manual_seed(seed * 7919 + b)
        pitch, glide, first, second = (float(v) for v in torch.rand(4, generator=gen))
        f0 = 100 + 80 * pitch + 25 * torch.sin(2 * math.pi * (0.7 + glide) * time)
        phase = 2 * math.pi * torch.cumsum(f0, 0) / sample_rate_hz
        formants = (
            500 + 250 * torch.sin(2 * math.pi * (1.1 + first) * time),
            1500 + 600 * torch.sin(2 * math.pi * (1.7 + second) * time),
        )
        voice = torch.zeros(samples, dtype=torch.float64)
        for k in range(1, 25):
            level = sum(torch.exp(-(((k * f0 - f) / 200) ** 2)) for f in formants) + 0.03
            voice += level * torch.sin(k * phase)
        syllable = torch.sin(2 * math.pi * (1.5 + pitch) * time).clamp(min=-0.2) + 0.2
        breath = torch.randn(samples, generator=gen, dtype=torch.float64)
        item = voice * syllable + 0.05 * breath
        rms = item.pow(2).mean().sqrt() if samples else torch.ones(())
        items.append((0.1 * item / rms).clamp(-0.9, 0.9))
    return torch.stack(items)[:, None].float() if items else torch.zeros(0, 1, samples)


def make_features(frames: int, batch: int = 1, dim: int = 1024, seed: int = 0) -> Tensor:
    """Return feature-like input [batch, dim, frames] float32: unit variance, neighbouring frames alike."""
    gen = torch.Generator().manual_seed(seed * 104729 + 1)
    noise = torch.randn(batch, dim, frames + 1, generator=gen)
    return (0.5 * noise[..., :-1] + noise[..., 1:]) / math.sqrt(1.25)


def make_inputs(
    model: reference.DualCodec,
    frames: int = 9,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    short: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return audio [batch, 1, S] that ends within its last frame, and features, `short` frames fewer."""
    audio = make_speech(max(0, frames * model.dac.hop_length - 3), batch)
    feat = make_features(frames - short, batch, model.settings["semantic_dim"])
    return audio.to(dtype), feat.to(dtype)


@torch.no_grad()
def rvq_margin_bound(
    z: Tensor,  # [B, C, F]
    in_weight: Tensor,  # [Q, D, C]
    in_bias: Tensor,  # [Q, D]
    codebooks: Tensor,  # [Q, N, D]
    out_weight: Tensor,  # [Q, C, D]
    out_bias: Tensor,  # [Q, C]
    relative_error: float = 2.0**-22,
) -> Tensor:
    """Return the margin below which rounding may choose another code.

    Args:
        relative_error: of z and of every value added to it (default: four float32 roundings).

    Returns:
        [B, Q, F] float64. An error of norm d in the residual moves e by at most |W| d, its direction by |W| d
        / |e|, and the difference of two squared distances by 4 times that; the search itself adds 8 errors of
        order one.
    """
    z, in_weight, in_bias, codebooks, out_weight, out_bias = (
        t.double() for t in (z, in_weight, in_bias, codebooks, out_weight, out_bias)
    )
    residual, summed, bounds = (
        z,
        z.norm(dim=1),
        [],
    )  # summed [B, F]: how much has gone into the residual so far
    for i in range(in_weight.shape[0]):
        e = in_weight[i] @ residual + in_bias[i][:, None]
        gain = torch.linalg.matrix_norm(in_weight[i], 2)
        moved = gain * summed / e.norm(dim=1).clamp(min=1e-30)
        bounds.append(relative_error * (4 * moved + 8))
        index, _ = ref_ops.nearest_rows(e.transpose(1, 2).reshape(-1, e.shape[1]), codebooks[i])
        rows = codebooks[i][index].reshape(e.shape[0], e.shape[2], -1).transpose(1, 2)
        z_q = out_weight[i] @ rows + out_bias[i][:, None]
        residual, summed = residual - z_q, summed + z_q.norm(dim=1)
    return torch.stack(bounds, 1)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill tensors allocated inside with NaN (integers with their largest value) until they are written."""
    switch: Any = deterministic  # a property that type checkers do not see
    mode, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        switch.fill_uninitialized_memory = fill


def poison_past_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """Return a copy of x [B, ..., T] with NaN at and past each item's length."""
    ones = ref_ops.mask_past_lengths(torch.ones_like(x), lengths)
    return torch.where(ones.bool(), x, torch.nan)


def strided_copies(x: Tensor) -> dict[str, Tensor]:
    """Return copies of x [B, C, T] with the same values in other memory layouts, NaN between them."""
    b, c, t = x.shape

    def inside(shape: tuple[int, ...], *index: slice) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)[index]

    views = {
        "contiguous": inside((b, c, t)),
        "channels_last": inside((b, t, c)).transpose(1, 2),
        "time_slice": inside((b, c, t + 5), slice(None), slice(None), slice(3, 3 + t)),
        "every_second": inside((b, c, 2 * t + 1), slice(None), slice(None), slice(1, None, 2)),
        "channel_slice": inside((b, t, c + 3), slice(None), slice(None), slice(1, 1 + c)).transpose(1, 2),
        "time_first": inside((t, b, c)).permute(1, 2, 0),
    }
    for view in views.values():
        view.copy_(x)
    return views
