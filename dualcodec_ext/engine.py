"""The inference program: a model's weights, folded and packed once, run on the ops.

Activations are channels-last from the first convolution to the last. Every step maps lengths as it maps samples, so
that a clip in a padded batch gives what it gives alone; all steps' lengths are worked out on the CPU before the first
one runs, and go to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops, reference
from .ops import packing
from .reference.layers import CausalConv1d, CausalUpsample, WNConv1d, WNConvTranspose1d


def _placeholder(weight: Tensor) -> Tensor:
    """Return a tensor of the weight's shape and one element's memory: with `packed` given, ops read the shape alone."""
    return weight.new_zeros(1).expand(*weight.shape)


def _vector(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.detach().reshape(-1).to(dtype, copy=True)


def _vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Kernels accumulate, and take biases and the like, in float32 for activations of every dtype but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """CPU kernels keep weights in the accumulation dtype, CUDA's in that of the activations, for tensor cores."""
    return _vector_dtype(dtype) if device.type == "cpu" else dtype


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
        weight: Tensor,  # [Cout, Cin, K], in the dtype to pack
        bias: Tensor | None,
        alpha: Tensor | None = None,
        stride: int = 1,
        dilation: int = 1,
        padding: tuple[int, int] = (0, 0),
        activation: str = "none",
    ) -> ConvStep:
        vectors = _vector_dtype(weight.dtype)
        return cls(
            _placeholder(weight),
            packing.pack_conv1d(weight, stride, dilation),
            _vector(bias, vectors),
            _vector(alpha, vectors),
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

    def __call__(self, x: Tensor, lengths: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return ops.snake_conv1d(
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

    def output_lengths(self, lengths: Tensor) -> Tensor:
        reach = (self.weight.shape[-1] - 1) * self.dilation + 1
        steps = torch.div(lengths + sum(self.padding) - reach, self.stride, rounding_mode="floor") + 1
        return torch.where(lengths > 0, steps.clamp(min=0), 0)


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
        vectors = _vector_dtype(dtype)
        return cls(
            alpha.detach().reshape(-1).to(vectors, copy=True),
            _placeholder(weight),
            packed,
            _vector(inner.bias, vectors),
            conv.stride,
            mode,
            padding,
        )

    def __call__(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return ops.snake_upsample1d(
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

    def output_lengths(self, lengths: Tensor) -> Tensor:
        if self.mode == "repeat":
            steps = lengths * self.stride + sum(self.padding) - 2 * self.stride + 1
        else:
            steps = (lengths + 1) * self.stride - sum(self.padding)
        return torch.where(lengths > 0, steps.clamp(min=0), 0)


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
        vectors = _vector_dtype(dtype)
        alpha1, alpha2 = _vector(snake1.alpha, vectors), _vector(snake2.alpha, vectors)
        assert alpha1 is not None and alpha2 is not None
        return cls(
            (
                alpha1,
                _placeholder(weight1),
                _vector(inner1.bias, vectors),
                alpha2,
                _placeholder(weight2),
                _vector(inner2.bias, vectors),
            ),
            packed,
            inner1.dilation,
            isinstance(conv1, CausalConv1d),
        )

    def __call__(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return ops.residual_unit(
            x, *self.tensors, dilation=self.dilation, causal=self.causal, lengths=lengths, packed=self.packed
        )

    def output_lengths(self, lengths: Tensor) -> Tensor:
        return lengths


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
        vectors = _vector_dtype(dtype)
        depthwise = block.dwconv.weight.detach().reshape(block.dwconv.weight.shape[0], -1).to(vectors, copy=True)
        taps = depthwise.shape[1]
        return cls(
            depthwise,
            _vector(block.dwconv.bias, vectors),
            (taps - 1, 0) if block.is_causal else (taps // 2, taps // 2),
            (_vector(block.norm.weight, vectors), _vector(block.norm.bias, vectors), block.norm.eps),
            ConvStep.of(block.pwconv1.weight.detach().to(dtype)[..., None], block.pwconv1.bias, activation="gelu"),
            ConvStep.of(block.pwconv2.weight.detach().to(dtype)[..., None], block.pwconv2.bias),
        )

    def __call__(self, x: Tensor, lengths: Tensor | None) -> Tensor:
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
        return self.contract(self.expand(y, lengths), lengths, residual=x)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        return lengths


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
            in_weight=_placeholder(tensors["in_weight"]),
            in_bias=tensors["in_bias"],
            codebooks=_placeholder(tensors["codebooks"]),
            out_weight=_placeholder(tensors["out_weight"]),
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
            addend = self.out_bias.new_zeros(codes.shape[0], codes.shape[2], self.out_weight.shape[1], dtype=dtype)
            addend = addend.transpose(1, 2)
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


def _run(steps: Sequence[Step], x: Tensor, lengths: Sequence[Tensor] | None) -> Tensor:
    """Run steps on x [B, C, T]; lengths: of what each step is given, or None: all T."""
    for i, step in enumerate(steps):
        x = step(x, None if lengths is None else lengths[i])
    return x


def _lengths_through(steps: Sequence[Step], lengths: Tensor) -> list[Tensor]:
    """Return the lengths [B] of what each step is given, when the first is given `lengths`."""
    found = []
    for step in steps:
        found.append(lengths)
        lengths = step.output_lengths(lengths)
    return found


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
        dtype: of the activations, float32, float64 (CPU alone), bfloat16 or float16.

    Numerics: float32 accumulation (float64 for float64); codes are searched in float32 at least. A clip's result
        depends neither on the batch it is in nor on the number of threads.
    """

    def __init__(self, model: reference.DualCodec, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device = next(model.parameters()).device
        weights, vectors = _weight_dtype(dtype, self.device), _vector_dtype(dtype)
        with torch.no_grad():
            self._semantic_encoder = _program(list(model.convnext_encoder), weights)
            self._semantic_decoder = _program(list(model.convnext_decoder), weights)
            self._semantic_quantizer = Quantizer.of(model.semantic_vq, vectors)
            self._acoustic_encoder = _program(list(model.dac.encoder.block), weights)
            self._acoustic_quantizer = Quantizer.of(model.dac.quantizer, vectors)
            self._decoder = _program(list(model.dac.decoder.model), weights)
        self._decode_semantic = model.decode_semantic_for_codec
        self.hop_samples = model.dac.hop_length
        self.semantic_entries = self._semantic_quantizer.codebooks.shape[1]
        self.acoustic_entries = self._acoustic_quantizer.codebooks.shape[1]

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
        x = x.to(device=self.device, dtype=self.dtype)
        channels, steps = x.shape[1:]
        if channels == 1:  # same memory; only the stride tells the ops which layout to go on in
            return x.contiguous().as_strided(x.shape, (steps, 1, 1))
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def encode_lengths(self, frame_lengths: Tensor, sample_lengths: Tensor | None) -> Tensor:
        """Return the lengths [rows, B] that `encode` needs, on the CPU, from those of its inputs on the CPU."""
        rows = [frame_lengths, *_lengths_through(self._semantic_encoder, frame_lengths)]
        if sample_lengths is not None:
            rows += _lengths_through(self._semantic_decoder, frame_lengths)
            rows += _lengths_through(self._acoustic_encoder, sample_lengths)
        return torch.stack(rows)

    def encode(
        self,
        audio: Tensor | None,
        semantic_repr: Tensor,
        num_quantizers: int | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn features, and audio where acoustic codes are wanted, into codes.

        Args:
            audio: [B, 1, S] with S a multiple of the hop; None: semantic codes alone.
            semantic_repr: [B, semantic_dim, F].
            num_quantizers: acoustic codebooks to use, None: all.
            lengths: `encode_lengths`, on this engine's device; None: none is shorter.

        Returns:
            Codes [B, 1, F] and [B, q, F] or None.
        """
        rows: list[Tensor] | None = None if lengths is None else list(lengths)
        frames = rows.pop(0) if rows else None

        def take(steps: Sequence[Step]) -> list[Tensor] | None:
            return None if rows is None else [rows.pop(0) for _ in steps]

        x = self._channels_last(semantic_repr)
        x = _run(self._semantic_encoder, x, take(self._semantic_encoder))
        codes, latent = self._semantic_quantizer.search(x, frames, return_quantized=audio is not None)
        if audio is None or latent is None:
            return codes, None
        through = take(self._semantic_decoder)
        if self._decode_semantic:
            latent = _run(self._semantic_decoder, latent, through)
        z = _run(self._acoustic_encoder, self._channels_last(audio), take(self._acoustic_encoder))
        residual = z[..., : latent.shape[-1]] - latent
        return codes, self._acoustic_quantizer.search(residual, frames, num_quantizers)[0]

    def decode_lengths(self, frame_lengths: Tensor) -> Tensor:
        """Return the lengths [rows, B] that `decode` needs, on the CPU, from those of the codes on the CPU."""
        through = (_lengths_through(steps, frame_lengths) for steps in (self._semantic_decoder, self._decoder))
        return torch.stack([frame_lengths, *(row for rows in through for row in rows)])

    def decoded_samples(self, frames: int) -> int:
        """Return the samples that decoding `frames` frames gives."""
        lengths = torch.tensor([frames])
        for step in self._decoder:
            lengths = step.output_lengths(lengths)
        return int(lengths)

    def decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Turn codes into audio.

        Args:
            semantic_codes: [B, 1, F].
            acoustic_codes: [B, q, F] or None.
            lengths: `decode_lengths`, on this engine's device; None: none is shorter.

        Returns:
            Audio [B, 1, S'].
        """
        semantic_codes = semantic_codes.to(self.device)
        acoustic_codes = None if acoustic_codes is None else acoustic_codes.to(self.device)
        frames: Tensor | None = None
        semantic: list[Tensor] | None = None
        decoder: list[Tensor] | None = None
        if lengths is not None:
            frames, rows = lengths[0], list(lengths[1:])
            semantic, decoder = rows[: len(self._semantic_decoder)], rows[len(self._semantic_decoder) :]
        latent = self._semantic_quantizer.lookup(semantic_codes, frames, None, self.dtype)
        if self._decode_semantic:
            latent = _run(self._semantic_decoder, latent, semantic)
        if acoustic_codes is not None:
            latent = self._acoustic_quantizer.lookup(acoustic_codes, frames, latent, self.dtype)
        return _run(self._decoder, latent, decoder)
