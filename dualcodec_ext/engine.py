"""The inference program: a model's weights, folded and packed once, run on the ops.

Activations are channels-last from the first convolution to the last. Every step maps lengths as it maps samples, so
that a clip in a padded batch gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, reference
from .ops import packing
from .reference.layers import CausalConv1d, CausalUpsample, WNConv1d, WNConvTranspose1d

Signal = tuple[Tensor, Tensor | None]  # [B, C, T] and the lengths [B] of its items (None: all T)


def _placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of the weight's shape and one element's memory: with `packed` given, ops read the shape alone."""
    return torch.zeros(1, dtype=dtype).expand(*shape)


def _vector(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.detach().reshape(-1).to(dtype, copy=True)


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Kernels accumulate, and so keep their weights, in float32 for every dtype but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inner(conv: nn.Module) -> WNConv1d:
    """Return the convolution inside a causal wrapper, or the convolution itself."""
    inner = conv.conv if isinstance(conv, CausalConv1d) else conv
    assert isinstance(inner, WNConv1d)
    return inner


@dataclass
class ConvStep:
    """`ops.snake_conv1d` with its weights."""

    weight: Tensor
    packed: Tensor
    bias: Tensor | None
    alpha: Tensor | None
    stride: int
    dilation: int
    padding: tuple[int, int]
    activation: str

    @classmethod
    def of(
        cls,
        weight: Tensor,  # [Cout, Cin, K], the accumulation dtype
        bias: Tensor | None,
        alpha: Tensor | None = None,
        stride: int = 1,
        dilation: int = 1,
        padding: tuple[int, int] = (0, 0),
        activation: str = "none",
    ) -> ConvStep:
        dtype = weight.dtype
        return cls(
            _placeholder(weight.shape, dtype),
            packing.pack_conv1d(weight, stride, dilation),
            _vector(bias, dtype),
            _vector(alpha, dtype),
            stride,
            dilation,
            padding,
            activation,
        )

    @classmethod
    def of_conv(
        cls,
        conv: WNConv1d | CausalConv1d,
        dtype: torch.dtype,
        alpha: Tensor | None = None,
        activation: str = "none",
    ) -> ConvStep:
        inner = _inner(conv)
        return cls.of(
            inner.folded_weight(dtype),
            inner.bias,
            alpha,
            inner.stride,
            inner.dilation,
            inner.padding,
            activation,
        )

    def __call__(self, signal: Signal, residual: Tensor | None = None) -> Signal:
        x, lengths = signal
        y = ops.snake_conv1d(
            x,
            self.weight,
            self.bias,
            self.alpha,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            activation=self.activation,
            residual=residual,
            lengths=lengths,
            packed=self.packed,
        )
        if lengths is not None:
            reach = (self.weight.shape[-1] - 1) * self.dilation + 1
            steps = torch.div(lengths + sum(self.padding) - reach, self.stride, rounding_mode="floor") + 1
            lengths = torch.where(lengths > 0, steps.clamp(min=0), 0)
        return y, lengths


@dataclass
class UpsampleStep:
    """`ops.snake_upsample1d` with its weights."""

    alpha: Tensor
    weight: Tensor
    packed: Tensor
    bias: Tensor | None
    stride: int
    mode: str
    padding: tuple[int, int]

    @classmethod
    def of(cls, alpha: Tensor, conv: WNConvTranspose1d | CausalUpsample, dtype: torch.dtype) -> UpsampleStep:
        inner: WNConv1d | WNConvTranspose1d
        if isinstance(conv, CausalUpsample):
            inner, mode, padding = _inner(conv.conv), "repeat", conv.padding
        else:
            inner, mode, padding = conv, "transposed", conv.padding
        weight = inner.folded_weight(dtype)
        packed = packing.pack_upsample1d(weight, conv.stride, mode, padding)
        flat = alpha.detach().reshape(-1).to(dtype, copy=True)
        return cls(
            flat,
            _placeholder(weight.shape, dtype),
            packed,
            _vector(inner.bias, dtype),
            conv.stride,
            mode,
            padding,
        )

    def __call__(self, signal: Signal) -> Signal:
        x, lengths = signal
        y = ops.snake_upsample1d(
            x,
            self.alpha,
            self.weight,
            self.bias,
            stride=self.stride,
            mode=self.mode,
            padding=self.padding,
            lengths=lengths,
            packed=self.packed,
        )
        if lengths is not None:
            if self.mode == "repeat":
                steps = lengths * self.stride + sum(self.padding) - 2 * self.stride + 1
            else:
                steps = (lengths + 1) * self.stride - sum(self.padding)
            lengths = torch.where(lengths > 0, steps.clamp(min=0), 0)
        return y, lengths


@dataclass
class ResidualUnitStep:
    """`ops.residual_unit` with its weights; the length stays."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
    packed: Tensor
    dilation: int
    causal: bool

    @classmethod
    def of(cls, unit: reference.ResidualUnit, dtype: torch.dtype) -> ResidualUnitStep:
        snake1, conv1, snake2, conv2 = unit.block
        assert isinstance(snake1, reference.Snake1d) and isinstance(snake2, reference.Snake1d)
        inner1, inner2 = _inner(conv1), _inner(conv2)
        weight1, weight2 = inner1.folded_weight(dtype), inner2.folded_weight(dtype)
        packed = packing.pack_residual_unit(weight1, weight2)
        alpha1, alpha2 = _vector(snake1.alpha, dtype), _vector(snake2.alpha, dtype)
        assert alpha1 is not None and alpha2 is not None
        return cls(
            (
                alpha1,
                _placeholder(weight1.shape, dtype),
                _vector(inner1.bias, dtype),
                alpha2,
                _placeholder(weight2.shape, dtype),
                _vector(inner2.bias, dtype),
            ),
            packed,
            inner1.dilation,
            isinstance(conv1, CausalConv1d),
        )

    def __call__(self, signal: Signal) -> Signal:
        x, lengths = signal
        y = ops.residual_unit(
            x, *self.tensors, dilation=self.dilation, causal=self.causal, lengths=lengths, packed=self.packed
        )
        return y, lengths


@dataclass
class ConvNeXtStep:
    """A ConvNeXt block: depthwise convolution with LayerNorm, linear with GELU, linear plus the input."""

    weight: Tensor
    bias: Tensor | None
    padding: tuple[int, int]
    norm: tuple[Tensor | None, Tensor | None, float]
    expand: ConvStep
    contract: ConvStep

    @classmethod
    def of(cls, block: reference.ConvNeXtBlock, dtype: torch.dtype) -> ConvNeXtStep:
        depthwise = block.dwconv.weight.detach().reshape(block.dwconv.weight.shape[0], -1).to(dtype, copy=True)
        taps = depthwise.shape[1]
        return cls(
            depthwise,
            _vector(block.dwconv.bias, dtype),
            (taps - 1, 0) if block.is_causal else (taps // 2, taps // 2),
            (_vector(block.norm.weight, dtype), _vector(block.norm.bias, dtype), block.norm.eps),
            ConvStep.of(block.pwconv1.weight.detach().to(dtype)[..., None], block.pwconv1.bias, activation="gelu"),
            ConvStep.of(block.pwconv2.weight.detach().to(dtype)[..., None], block.pwconv2.bias),
        )

    def __call__(self, signal: Signal) -> Signal:
        x, lengths = signal
        ln_weight, ln_bias, eps = self.norm
        y = ops.causal_dwconv1d(
            x,
            self.weight,
            self.bias,
            padding=self.padding,
            ln_weight=ln_weight,
            ln_bias=ln_bias,
            eps=eps,
            lengths=lengths,
        )
        return self.contract(self.expand((y, lengths)), residual=x)


@dataclass
class Quantizer:
    """The stages of one RVQ: search and lookup share the packed tensor."""

    in_weight: Tensor
    in_bias: Tensor
    codebooks: Tensor
    out_weight: Tensor
    out_bias: Tensor
    packed: Tensor

    @classmethod
    def of(cls, rvq: reference.ResidualVectorQuantize, dtype: torch.dtype) -> Quantizer:
        tensors = rvq.op_tensors(dtype)
        packed = packing.pack_rvq(**tensors)
        return cls(
            in_weight=_placeholder(tensors["in_weight"].shape, dtype),
            in_bias=tensors["in_bias"],
            codebooks=_placeholder(tensors["codebooks"].shape, dtype),
            out_weight=_placeholder(tensors["out_weight"].shape, dtype),
            out_bias=tensors["out_bias"],
            packed=packed,
        )

    def search(
        self,
        z: Tensor,
        lengths: Tensor | None,
        num_quantizers: int | None = None,
        return_quantized: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        result = ops.rvq_search(
            z,
            self.in_weight,
            self.in_bias,
            self.codebooks,
            self.out_weight,
            self.out_bias,
            num_quantizers=num_quantizers,
            return_quantized=return_quantized,
            lengths=lengths,
            packed=self.packed,
        )
        return result[0], result[1]

    def lookup(self, codes: Tensor, lengths: Tensor | None, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
        if addend is None:  # carries the dtype and the layout of the result
            addend = torch.zeros(1, dtype=dtype).expand(codes.shape[0], codes.shape[2], self.out_weight.shape[1])
            addend = addend.contiguous().transpose(1, 2)
        return ops.rvq_lookup(
            codes,
            self.codebooks,
            self.out_weight,
            self.out_bias,
            addend=addend,
            lengths=lengths,
            channels_last=True,
            packed=self.packed,
        )


Step = ConvStep | UpsampleStep | ResidualUnitStep | ConvNeXtStep


def _run(steps: Sequence[Step], signal: Signal) -> Signal:
    for step in steps:
        signal = step(signal)
    return signal


def _program(modules: Sequence[nn.Module], dtype: torch.dtype) -> list[Step]:
    """Turn a run of reference modules into steps; a Snake is taken into the convolution behind it."""
    steps: list[Step] = []
    alpha: Tensor | None = None
    for module in modules:
        if isinstance(module, reference.Snake1d):
            alpha = module.alpha
        elif isinstance(module, WNConv1d | CausalConv1d):
            steps.append(ConvStep.of_conv(module, dtype, alpha))
            alpha = None
        elif isinstance(module, WNConvTranspose1d | CausalUpsample):
            assert alpha is not None
            steps.append(UpsampleStep.of(alpha, module, dtype))
            alpha = None
        elif isinstance(module, reference.ResidualUnit):
            steps.append(ResidualUnitStep.of(module, dtype))
        elif isinstance(module, reference.ConvNeXtBlock):
            steps.append(ConvNeXtStep.of(module, dtype))
        elif isinstance(module, nn.Tanh):
            last = steps[-1]
            assert isinstance(last, ConvStep)
            last.activation = "tanh"
        else:  # a block of blocks
            inner = getattr(module, "block", module)
            assert isinstance(inner, nn.Sequential), f"engine: no step for {type(module).__name__}"
            steps.extend(_program(list(inner), dtype))
    return steps


class Engine:
    """One model's packed weights, and encode and decode on them.

    Args:
        model: the parameters; they are copied, folded and packed here, and not looked at again.
        dtype: of the activations, float32, float64, bfloat16 or float16.

    Numerics: float32 accumulation (float64 for float64); codes are searched in float32 at least. A clip's result
        depends neither on the batch it is in nor on the number of threads.
    """

    def __init__(self, model: reference.DualCodec, dtype: torch.dtype) -> None:
        self.dtype = dtype
        weights = _weight_dtype(dtype)
        with torch.no_grad():
            self._semantic_encoder = _program(list(model.convnext_encoder), weights)
            self._semantic_decoder = _program(list(model.convnext_decoder), weights)
            self._semantic_quantizer = Quantizer.of(model.semantic_vq, weights)
            self._acoustic_encoder = _program(list(model.dac.encoder.block), weights)
            self._acoustic_quantizer = Quantizer.of(model.dac.quantizer, weights)
            self._decoder = _program(list(model.dac.decoder.model), weights)
        self._decode_semantic = model.decode_semantic_for_codec

    def weight_bytes(self) -> int:
        """Return the memory of the packed weights, in bytes."""
        seen: dict[int, int] = {}

        def visit(value: object) -> None:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, list | tuple):
                for item in value:
                    visit(item)
            elif hasattr(value, "__dict__"):
                for item in vars(value).values():
                    visit(item)

        visit(list(vars(self).values()))
        return sum(seen.values())

    def _channels_last(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        channels, steps = x.shape[1:]
        if channels == 1:  # same memory; only the stride tells the ops which layout to go on in
            return x.contiguous().as_strided(x.shape, (steps, 1, 1))
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def semantic_codes(
        self, semantic_repr: Tensor, frame_lengths: Tensor | None, return_latent: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Quantise features [B, semantic_dim, F] to codes [B, 1, F] and, on request, the latent to subtract."""
        x, lengths = _run(self._semantic_encoder, (self._channels_last(semantic_repr), frame_lengths))
        codes, latent = self._semantic_quantizer.search(x, lengths, return_quantized=return_latent)
        if latent is not None and self._decode_semantic:
            latent = _run(self._semantic_decoder, (latent, lengths))[0]
        return codes, latent

    def acoustic_codes(
        self,
        audio: Tensor,
        semantic_latent: Tensor,
        num_quantizers: int | None,
        sample_lengths: Tensor | None,
        frame_lengths: Tensor | None,
    ) -> Tensor:
        """Quantise audio [B, 1, S], S a multiple of the hop, less the latent [B, C, F], to codes [B, q, F]."""
        z, _ = _run(self._acoustic_encoder, (self._channels_last(audio), sample_lengths))
        frames = semantic_latent.shape[-1]
        residual = z[..., :frames] - semantic_latent
        return self._acoustic_quantizer.search(residual, frame_lengths, num_quantizers)[0]

    def decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None) -> Tensor:
        """Turn codes [B, 1, F] and [B, q, F] (or None) into audio [B, 1, S']."""
        latent = self._semantic_quantizer.lookup(semantic_codes, frame_lengths, None, self.dtype)
        if self._decode_semantic:
            latent = _run(self._semantic_decoder, (latent, frame_lengths))[0]
        if acoustic_codes is not None:
            latent = self._acoustic_quantizer.lookup(acoustic_codes, frame_lengths, latent, self.dtype)
        return _run(self._decoder, (latent, frame_lengths))[0]
