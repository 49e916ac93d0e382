"""Input makers and comparers for tests and benches: seeded weights, speech-like audio, and the rules of
closeness."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from . import reference
from .reference import ops as ref_ops

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
            value = gains.get(path, 1.0) * (1 + 0.1 * noise) * _unit_gain(owner, parameter)
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


def _unit_gain(owner: Any, g: Tensor) -> float:
    """Return the |v| for which a convolution's output has its input's mean square."""
    if not isinstance(owner, nn.ConvTranspose1d | reference.WNConvTranspose1d):
        return 1.0
    # Here g is per input channel: each output adds two taps of every input channel.
    cin, cout, taps = owner.weight_v.shape
    return math.sqrt(cout * taps / (2 * cin))


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


def rvq_tensors(rvq: reference.ResidualVectorQuantize, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a quantiser's tensors by `rvq_search`'s argument names; unequal code dims are padded with
    zeros."""
    stages = rvq.stages()
    wide = max(stage.codebook_dim for stage in stages)

    def pad(x: Tensor, dim: int) -> Tensor:
        missing = list(x.shape)
        missing[dim] = wide - x.shape[dim]
        return torch.cat([x.detach().to(dtype), x.new_zeros(missing, dtype=dtype)], dim)

    return {
        "in_weight": torch.stack([pad(s.in_proj.folded_weight(dtype)[..., 0], 0) for s in stages]),
        "in_bias": torch.stack([pad(s.in_proj.bias, 0) for s in stages]),
        "codebooks": torch.stack([pad(s.codebook.weight, 1) for s in stages]),
        "out_weight": torch.stack([pad(s.out_proj.folded_weight(dtype)[..., 0], 1) for s in stages]),
        "out_bias": torch.stack([s.out_proj.bias.detach().to(dtype) for s in stages]),
    }


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


def one_ulp(largest: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of `dtype` at magnitude `largest`."""
    if largest == 0 or not math.isfinite(largest):
        return torch.finfo(dtype).tiny
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)))


@dataclass(frozen=True)
class ErrorReport:
    """Errors against float64: ours, the baseline's, and what was allowed."""

    rms: float
    worst: float
    baseline_rms: float
    baseline_worst: float
    allowed_rms: float
    allowed_worst: float
    at: tuple[int, ...]  # where ours is worst

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3g} (baseline {self.baseline_rms:.3g}, allowed {self.allowed_rms:.3g}), max"
            f" {self.worst:.3g} (baseline {self.baseline_worst:.3g}, allowed {self.allowed_worst:.3g}) at {self.at}"
        )


def _check_same_kind(actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"shape must be {list(expected.shape)}, got {list(actual.shape)}")
    wrong = (actual.isnan() != expected.isnan()).nonzero()
    if wrong.numel():
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"NaN must be where it is expected: {len(wrong)} differ, first at {at}: expected"
            f" {float(expected[at])}, got {float(actual[at])}"
        )


def assert_close_to_f64(
    actual: Tensor, reference_f64: Tensor, baseline: Tensor, factor: float = 2.0, fewest: int = 100_000
) -> ErrorReport:
    """Assert that an error against float64 is at most `factor` times plain PyTorch's, in RMS and in maximum.

    Args:
        actual: what is tested.
        reference_f64: the same in float64.
        baseline: the same from plain PyTorch in actual's dtype.
        factor: how much larger the error may be; one ulp of the largest output is always allowed.
        fewest: outputs needed for a maximum to mean something; fewer raise ValueError (`assert_close` is for
            those).

    Raises:
        AssertionError: too large an error, another shape, another dtype, or NaN in other places.
    """
    if reference_f64.dtype != torch.float64:
        raise ValueError(f"assert_close_to_f64: reference_f64 must be float64, got {reference_f64.dtype}")
    if actual.numel() < fewest:
        raise ValueError(
            f"assert_close_to_f64: actual must have at least {fewest} outputs, got {actual.numel()}"
        )
    if actual.dtype != baseline.dtype:
        raise AssertionError(f"dtype must be the baseline's {baseline.dtype}, got {actual.dtype}")
    _check_same_kind(actual, reference_f64)
    _check_same_kind(baseline, reference_f64)
    ours = (actual.detach().double() - reference_f64).abs().nan_to_num(nan=0.0, posinf=math.inf)
    theirs = (baseline.detach().double() - reference_f64).abs().nan_to_num(nan=0.0, posinf=math.inf)
    floor = one_ulp(float(reference_f64.nan_to_num().abs().max()), actual.dtype)
    at = torch.unravel_index(ours.argmax(), ours.shape)
    report = ErrorReport(
        rms=float(ours.square().mean().sqrt()),
        worst=float(ours.max()),
        baseline_rms=float(theirs.square().mean().sqrt()),
        baseline_worst=float(theirs.max()),
        allowed_rms=max(factor * float(theirs.square().mean().sqrt()), floor),
        allowed_worst=max(factor * float(theirs.max()), floor),
        at=tuple(int(i) for i in at),
    )
    if not (report.rms <= report.allowed_rms and report.worst <= report.allowed_worst):
        raise AssertionError(f"error against float64 too large: {report}")
    return report


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Assert that no element differs by more than `tolerance`, and that NaN is where it is expected; returns
    the worst."""
    _check_same_kind(actual, expected)
    if actual.numel() == 0:
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs()
    error = torch.where(actual.isnan() | (actual == expected), 0.0, error).nan_to_num(
        nan=math.inf, posinf=math.inf
    )
    worst = float(error.max())
    if worst > tolerance:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"must be within {tolerance:.3g}: worst {worst:.3g} at {at}, expected {float(expected[at])}, got"
            f" {float(actual[at])}; {int((error > tolerance).sum())} of {error.numel()} are out"
        )
    return worst


@dataclass(frozen=True)
class CodeReport:
    """How two sets of codes [B, Q, F] compare."""

    total: int
    equal: int
    excused: int  # differ, and the reference's own margin is below the bound
    not_compared: int  # behind an excused code of the same frame, where the residual is another one

    def __str__(self) -> str:
        return f"{self.equal} of {self.total} equal, {self.excused} below the margin bound, {self.not_compared} behind those"


def compare_codes(codes: Tensor, expected: Tensor, margins: Tensor, bound: float | Tensor) -> CodeReport:
    """Assert that codes equal the reference's wherever its choice was clear.

    Args:
        codes: [B, Q, F], what is tested.
        expected: [B, Q, F], the reference's.
        margins: [B, Q, F], the reference's own.
        bound: a difference is excused where the margin is below it; a number or [B, Q, F].

    Returns:
        The counts.

    Raises:
        AssertionError: another shape, or a code that differs though its margin is not below the bound.
    """
    if codes.shape != expected.shape or margins.shape != expected.shape:
        raise AssertionError(
            f"codes and margins must be {list(expected.shape)}, got {list(codes.shape)} and {list(margins.shape)}"
        )
    differ = codes != expected
    behind = torch.cumsum(differ.int(), 1) - differ.int() > 0  # an earlier stage of the frame differs
    unclear = margins < bound
    first = differ & ~behind
    wrong = (first & ~unclear).nonzero()
    if wrong.numel():
        b, q, f = (int(i) for i in wrong[0])
        limit = float(bound[b, q, f]) if isinstance(bound, Tensor) else bound
        raise AssertionError(
            f"codes must be equal where the margin is clear: {len(wrong)} are not, first at batch {b}, stage {q},"
            f" frame {f}: expected {int(expected[b, q, f])}, got {int(codes[b, q, f])}, margin"
            f" {float(margins[b, q, f]):.3g}, bound {limit:.3g}"
        )
    return CodeReport(
        total=differ.numel(),
        equal=int((~differ & ~behind).sum()),
        excused=int(first.sum()),
        not_compared=int(behind.sum()),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every tensor that is allocated inside without values (NaN, or the largest integer), ours
    included."""
    mode, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


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
