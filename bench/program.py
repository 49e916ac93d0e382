"""The model as a list of layers, walked from its settings alone: the FLOP counts, the op shapes and the
folded peers come from here.

A layer names its parameters by their state-dict keys, so a list and a state dict are all it takes to rebuild
the model in another form (peers/folded.py), and no count is ever typed in by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conv:
    """A weight-normed convolution, with the Snake before it when `alpha` names one."""

    key: str
    c_in: int
    c_out: int
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    left: int = 0
    right: int = 0
    alpha: str | None = None
    tanh: bool = False

    def out_length(self, steps: int) -> int:
        return max(0, (steps + self.left + self.right - self.dilation * (self.taps - 1) - 1) // self.stride + 1)

    def flops(self, steps: int) -> float:
        return 2.0 * self.c_in * self.c_out * self.taps * self.out_length(steps)

    def weight_count(self) -> int:
        return self.c_in * self.c_out * self.taps + self.c_out


@dataclass(frozen=True)
class Upsample:
    """Snake, then a transposed convolution or nearest-repeat and a convolution; 2 * stride taps either
    way."""

    key: str
    alpha: str
    c_in: int
    c_out: int
    stride: int
    mode: str
    left: int
    right: int

    def out_length(self, steps: int) -> int:
        if self.mode == "transposed":
            return max(0, (steps + 1) * self.stride - self.left - self.right)
        return max(0, steps * self.stride + self.left + self.right - 2 * self.stride + 1)

    def flops(self, steps: int) -> float:
        # By phases: a transposed output sums two inputs. Of the 2S repeated samples under a nearest-repeat
        # output, the # window starts on a frame's edge for one phase in S, and so covers two frames there and
        # three elsewhere.
        inputs = 2.0 if self.mode == "transposed" else 3.0 - 1.0 / self.stride
        return 2.0 * self.c_in * self.c_out * inputs * self.out_length(steps)

    def weight_count(self) -> int:
        return self.c_in * self.c_out * 2 * self.stride + self.c_out


@dataclass(frozen=True)
class Unit:
    """A residual unit: Snake, k=7 dilated, Snake, 1x1, add."""

    alpha1: str
    wide: str
    alpha2: str
    narrow: str
    channels: int
    dilation: int
    causal: bool

    @property
    def padding(self) -> tuple[int, int]:
        return (6 * self.dilation, 0) if self.causal else (3 * self.dilation, 3 * self.dilation)

    def out_length(self, steps: int) -> int:
        return steps

    def flops(self, steps: int) -> float:
        return 2.0 * self.channels * self.channels * 8 * steps

    def weight_count(self) -> int:
        return self.channels * self.channels * 8 + 2 * self.channels


@dataclass(frozen=True)
class ConvNeXt:
    """Depthwise convolution, LayerNorm, two linears with GELU between, add."""

    key: str
    channels: int
    hidden: int
    left: int
    right: int
    taps: int = 7

    def out_length(self, steps: int) -> int:
        return steps

    def flops(self, steps: int) -> float:
        return 2.0 * self.channels * (self.taps + 2 * self.hidden) * steps

    def weight_count(self) -> int:
        return self.channels * (self.taps + 2 * self.hidden + 4) + self.hidden


@dataclass(frozen=True)
class Quantizer:
    """Residual vector quantisation: one in_proj, codebook and out_proj per stage under `key`.quantizers.i."""

    key: str
    channels: int
    entries: int
    dims: tuple[int, ...]

    def search_flops(self, frames: int, stages: int | None = None) -> float:
        """In and out projections and the distances, stage by stage as the definition has it."""
        return sum(2.0 * d * (2 * self.channels + self.entries) for d in self.dims[:stages]) * frames

    def lookup_flops(self, frames: int, stages: int | None = None) -> float:
        return sum(2.0 * d * self.channels for d in self.dims[:stages]) * frames

    def search_weights(self) -> int:
        return sum(d * (2 * self.channels + self.entries + 1) + self.channels for d in self.dims)

    def lookup_weights(self) -> int:
        """The projections out; of a codebook a lookup reads a row per frame, which is next to nothing."""
        return sum((d + 1) * self.channels for d in self.dims)


Layer = Conv | Upsample | Unit | ConvNeXt


@dataclass(frozen=True)
class Program:
    """Every layer of a codec, in the order that encode and decode run them."""

    hop_samples: int
    sample_rate_hz: int
    semantic_dim: int
    semantic_encoder: tuple[Layer, ...]
    semantic_vq: Quantizer
    semantic_decoder: tuple[Layer, ...]  # empty with decode_semantic_for_codec=False
    encoder: tuple[Layer, ...]
    rvq: Quantizer
    decoder: tuple[Layer, ...]

    def frames(self, seconds: float) -> int:
        """Whole frames nearest to `seconds` of audio, at least one."""
        return max(1, round(seconds * self.sample_rate_hz / self.hop_samples))

    def decode_flops(self, frames: int) -> float:
        quantizers = self.semantic_vq.lookup_flops(frames) + self.rvq.lookup_flops(frames)
        return quantizers + chain_flops(self.semantic_decoder, frames) + chain_flops(self.decoder, frames)

    def encode_flops(self, frames: int) -> float:
        """Both paths without the semantic model, which is not a part of the codec."""
        quantizers = self.semantic_vq.search_flops(frames) + self.rvq.search_flops(frames)
        semantic = chain_flops(self.semantic_encoder + self.semantic_decoder, frames)
        return quantizers + semantic + chain_flops(self.encoder, frames * self.hop_samples)

    def decode_weights(self) -> int:
        """Number of folded weights that a decode reads."""
        layers = sum(layer.weight_count() for layer in self.semantic_decoder + self.decoder)
        return layers + self.semantic_vq.lookup_weights() + self.rvq.lookup_weights()

    def encode_weights(self) -> int:
        layers = self.semantic_encoder + self.semantic_decoder + self.encoder
        searches = self.semantic_vq.search_weights() + self.rvq.search_weights()
        return sum(layer.weight_count() for layer in layers) + searches


def chain_flops(layers: Iterable[Layer], steps: int) -> float:
    return sum(flops for _, _, flops in walk(layers, steps))


def walk(layers: Iterable[Layer], steps: int) -> Iterable[tuple[Layer, int, float]]:
    """Each layer with its input length and its FLOPs."""
    for layer in layers:
        yield layer, steps, layer.flops(steps)
        steps = layer.out_length(steps)


def _pads(span: int, causal: bool) -> tuple[int, int]:
    return (span, 0) if causal else (span // 2, span // 2)


def _units(prefix: str, first: int, channels: int, causal: bool) -> list[Layer]:
    wrap = ".conv" if causal else ""
    units: list[Layer] = []
    for i, dilation in enumerate((1, 3, 9)):
        at = f"{prefix}.{first + i}.block"
        units.append(
            Unit(f"{at}.0.alpha", f"{at}.1{wrap}", f"{at}.2.alpha", f"{at}.3{wrap}", channels, dilation, causal)
        )
    return units


def _encoder(s: Mapping[str, Any], latent: int) -> tuple[Layer, ...]:
    causal = s["causal_encoder"]
    wrap = ".conv" if causal else ""
    channels = s["encoder_dim"]
    root = "dac.encoder.block"
    layers: list[Layer] = [Conv(f"{root}.0{wrap}", 1, channels, 7, 1, 1, *_pads(6, causal))]
    for i, stride in enumerate(s["encoder_rates"], 1):
        block = f"{root}.{i}.block"
        layers += _units(block, 0, channels, causal)
        half = math.ceil(stride / 2)
        left, right = (stride, 0) if causal else (half, half)
        layers.append(
            Conv(
                f"{block}.4{wrap}",
                channels,
                2 * channels,
                2 * stride,
                stride,
                1,
                left,
                right,
                f"{block}.3.alpha",
            )
        )
        channels *= 2
    last = len(s["encoder_rates"]) + 1
    alpha = f"{root}.{last}.alpha"
    layers.append(Conv(f"{root}.{last + 1}{wrap}", channels, latent, 3, 1, 1, *_pads(2, causal), alpha))
    return tuple(layers)


def _decoder(s: Mapping[str, Any], latent: int) -> tuple[Layer, ...]:
    causal = s["look_ahead"] if s["causal_decoder"] is None else s["causal_decoder"]
    wrap = ".conv" if causal else ""
    root = "dac.decoder.model"
    layers: list[Layer] = [Conv(f"{root}.0{wrap}", latent, s["decoder_dim"], 7, 1, 1, *_pads(6, causal))]
    channels = s["decoder_dim"]
    for i, stride in enumerate(s["decoder_rates"], 1):
        block = f"{root}.{i}.block"
        half = math.ceil(stride / 2)
        if not causal:
            key, mode, left, right = f"{block}.1", "transposed", half, half
        elif s["look_ahead"]:
            key, mode, left, right = f"{block}.1.conv", "repeat", half, 2 * stride - 1 - half
        else:
            key, mode, left, right = f"{block}.1.conv.conv", "repeat", 2 * stride - 1, 0
        layers.append(Upsample(key, f"{block}.0.alpha", channels, channels // 2, stride, mode, left, right))
        channels //= 2
        layers += _units(block, 2, channels, causal)
    last = len(s["decoder_rates"]) + 1
    alpha = f"{root}.{last}.alpha"
    layers.append(Conv(f"{root}.{last + 1}{wrap}", channels, 1, 7, 1, 1, *_pads(6, causal), alpha, tanh=True))
    return tuple(layers)


def _convnext(prefix: str, first: int, s: Mapping[str, Any]) -> list[Layer]:
    pads = _pads(6, s["is_causal"])
    width, hidden = s["convnext_dim"], s["convnext_intermediate_dim"]
    return [ConvNeXt(f"{prefix}.{first + i}", width, hidden, *pads) for i in range(s["convnext_layers"])]


def build_program(settings: Mapping[str, Any]) -> Program:
    """The layers of a codec.

    Args:
        settings: `DualCodecConfig.to_dict()` or a mapping with the same keys, all of them given.

    Returns:
        The program, from features and samples to codes and back.
    """
    s = dict(settings)
    latent = s["latent_dim"] or s["encoder_dim"] * 2 ** len(s["encoder_rates"])
    dims = s["codebook_dim"]
    stages = s["n_codebooks"]
    dims = (dims,) * stages if isinstance(dims, int) else tuple(dims)
    width = s["convnext_dim"]
    semantic_decoder: tuple[Layer, ...] = ()
    if s["decode_semantic_for_codec"]:
        head = Conv(f"convnext_decoder.{s['convnext_layers']}", width, latent)
        semantic_decoder = (*_convnext("convnext_decoder", 0, s), head)
    return Program(
        hop_samples=math.prod(s["encoder_rates"]),
        sample_rate_hz=s["sample_rate"],
        semantic_dim=s["semantic_dim"],
        semantic_encoder=(
            Conv("convnext_encoder.0", s["semantic_dim"], width),
            *_convnext("convnext_encoder", 1, s),
        ),
        semantic_vq=Quantizer("semantic_vq", width, s["semantic_codebook_size"], (s["semantic_codebook_dim"],)),
        semantic_decoder=semantic_decoder,
        encoder=_encoder(s, latent),
        rvq=Quantizer("dac.quantizer", latent, s["codebook_size"], dims),
        decoder=_decoder(s, latent),
    )
