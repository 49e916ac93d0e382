"""The steps of the inference program: an op each, with its weights folded and packed, and how it maps lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .forms import Form, unit_outputs, unit_products, upsample_products
from .ops import packing
from .reference.layers import CausalConv1d, CausalUpsample, WNConv1d, WNConvTranspose1d, inner_conv


def _placeholder(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the weight's shape and one element's memory: with `packed` given, ops read the shape alone."""
    return weight.new_zeros(1, dtype=dtype).expand(*weight.shape)


def _vector(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.detach().reshape(-1).to(dtype, copy=True)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Kernels accumulate, and take biases and the like, in float32 for activations of every dtype but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Kernels keep weights in the activations' dtype; on the CPU float16 has no products of its own."""
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Handed:
    """What a step hands to the next one; with `snaked`, x through that one's first Snake, it needs none of its own."""

    x: Tensor
    snaked: Tensor | None = None


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
        vectors = vector_dtype(weight.dtype)
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
        inner = inner_conv(conv)
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

    def into(self, out: Tensor, x: Tensor, residual: Tensor | None = None) -> None:
        """Compute out from every row that it needs: nothing is padded."""
        torch.ops.dualcodec_ext.snake_conv1d.out(
            x,
            self.weight,
            self.bias,
            self.alpha,
            self.stride,
            self.dilation,
            (0, 0),
            self.activation,
            residual,
            None,
            self.packed,
            out=out,
        )

    def output_lengths(self, lengths: Tensor) -> Tensor:
        reach = (self.weight.shape[-1] - 1) * self.dilation + 1
        steps = torch.div(lengths + sum(self.padding) - reach, self.stride, rounding_mode="floor") + 1
        return torch.where(lengths > 0, steps.clamp(min=0), 0)


@dataclass
class UpsampleStep:
    """`ops.snake_upsample1d` with its weights."""

    alpha: Tensor | None
    weight: Tensor
    packed: Tensor
    bias: Tensor | None
    stride: int
    mode: str
    padding: tuple[int, int]
    winograd: int = 0
    out_alpha: Tensor | None = None  # of the unit behind, which is handed both

    @classmethod
    def of(
        cls, alpha: Tensor, conv: WNConvTranspose1d | CausalUpsample, dtype: torch.dtype, form: Form = "direct"
    ) -> UpsampleStep:
        inner: WNConv1d | WNConvTranspose1d
        if isinstance(conv, CausalUpsample):
            inner, mode, padding = inner_conv(conv.conv), "repeat", conv.padding
        else:
            inner, mode, padding = conv, "transposed", conv.padding
        weight = inner.folded_weight(dtype)
        winograd = upsample_products(form, mode, inner.out_channels)
        packed = packing.pack_upsample1d(weight, conv.stride, mode, padding, winograd)
        vectors = vector_dtype(dtype)
        return cls(
            alpha.detach().reshape(-1).to(vectors, copy=True),
            _placeholder(weight),
            packed,
            _vector(inner.bias, vectors),
            conv.stride,
            mode,
            padding,
            winograd,
        )

    @property
    def granularity(self) -> int:
        """As of `ResidualUnitStep`."""
        return 3 * self.stride if self.winograd == 4 else 1

    def __call__(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.hand_on(Handed(x), lengths).x

    def hand_on(self, given: Handed, lengths: Tensor | None) -> Handed:
        tensors = (given.x, self.alpha, self.weight, self.bias)
        options: dict[str, Any] = {"stride": self.stride, "mode": self.mode, "padding": self.padding}
        options |= {"lengths": lengths, "packed": self.packed, "winograd": self.winograd}
        if self.out_alpha is None:
            return Handed(ops.snake_upsample1d(*tensors, **options))
        return Handed(*ops.snake_upsample1d_pair(*tensors, **options, out_alpha=self.out_alpha))

    def into(self, out: Tensor, x: Tensor, first: int) -> None:
        """Compute the output steps of x from `first` on, as many as out has."""
        layer = (self.alpha, self.weight, self.bias, self.stride, self.mode, self.padding)
        torch.ops.dualcodec_ext.snake_upsample1d.out(x, *layer, None, self.packed, self.winograd, first=first, out=out)

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
    winograd: int = 0
    out_alpha: Tensor | None = None  # of the layer behind, which is handed what comes out of its Snake
    hands_both: bool = False  # and, where it is a unit, what goes into it

    @classmethod
    def of(cls, unit: reference.ResidualUnit, dtype: torch.dtype, form: Form = "direct") -> ResidualUnitStep:
        snake1, conv1, snake2, conv2 = unit.block
        assert isinstance(snake1, reference.Snake1d) and isinstance(snake2, reference.Snake1d)
        inner1, inner2 = inner_conv(conv1), inner_conv(conv2)
        weight1, weight2 = inner1.folded_weight(dtype), inner2.folded_weight(dtype)
        winograd = unit_products(form, weight1.shape[0])
        packed = packing.pack_residual_unit(weight1, weight2, winograd)
        vectors = vector_dtype(dtype)
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
            winograd,
        )

    @property
    def granularity(self) -> int:
        """Steps that are computed as one group, counted from the clip's first one: elsewhere no tile may end."""
        return unit_outputs(self.winograd) * self.dilation if self.winograd else 1

    def __call__(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self.hand_on(Handed(x), lengths).x

    def hand_on(self, given: Handed, lengths: Tensor | None) -> Handed:
        options: dict[str, Any] = {"dilation": self.dilation, "causal": self.causal, "lengths": lengths}
        options |= {"packed": self.packed, "winograd": self.winograd, "out_alpha": self.out_alpha}
        options["snaked"] = given.snaked
        if self.hands_both:
            return Handed(*ops.residual_unit_pair(given.x, *self.tensors, **options))
        return Handed(ops.residual_unit(given.x, *self.tensors, **options))

    def into(self, out: Tensor, x: Tensor) -> None:
        """Compute out from every row that it needs: nothing is padded."""
        torch.ops.dualcodec_ext.residual_unit.out(
            x, *self.tensors, self.dilation, (0, 0), self.causal, None, self.packed, self.winograd, out=out
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
        vectors = vector_dtype(dtype)
        depthwise = block.dwconv.weight.detach().reshape(block.dwconv.weight.shape[0], -1).to(vectors, copy=True)
        taps = depthwise.shape[1]
        if depthwise.device.type == "cpu":
            depthwise = depthwise.t().contiguous().t()  # [K][C] in memory, which that kernel reads as it is
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

    def into(self, out: Tensor, x: Tensor, normed: Tensor, hidden: Tensor) -> None:
        """Compute out from every row that it needs, by way of two tensors of out's length: nothing is padded."""
        ln_weight, ln_bias, eps = self.norm
        torch.ops.dualcodec_ext.causal_dwconv1d.out(
            x, self.weight, self.bias, (0, 0), ln_weight, ln_bias, eps, None, out=normed
        )
        self.expand.into(hidden, normed)
        left = self.padding[0]
        self.contract.into(out, hidden, x[:, :, left : left + out.shape[2]])

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
        tensors = rvq.op_tensors(vector_dtype(dtype))
        packed = packing.pack_rvq(**tensors)
        return cls(
            in_weight=_placeholder(tensors["in_weight"]),
            in_bias=tensors["in_bias"],
            codebooks=_placeholder(tensors["codebooks"]),
            out_weight=_placeholder(tensors["out_weight"], dtype),  # rvq_lookup's result takes its dtype
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

    def lookup_into(
        self,
        out: Tensor,
        codes: Tensor,
        lengths: Tensor | None,
        addend: Tensor | None,
        error: Tensor | None = None,
    ) -> None:
        """Look up into out [B, C, F], which may be the addend itself.

        error [1] int64: becomes a code's place, if that is lower, where a code out of range would raise.
        """
        tensors = (self.codebooks, self.out_weight, self.out_bias, addend, lengths)
        torch.ops.dualcodec_ext.rvq_lookup.out(codes, *tensors, True, self.packed, error=error, out=out)

    def lookup(self, codes: Tensor, lengths: Tensor | None, addend: Tensor | None) -> Tensor:
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


def run(steps: Sequence[Step], x: Tensor, lengths: Sequence[Tensor] | None) -> Tensor:
    """Run steps on x [B, C, T]; lengths: of what each step is given, or None: all T."""
    handed = Handed(x)
    for i, step in enumerate(steps):
        own = None if lengths is None else lengths[i]
        if isinstance(step, UpsampleStep | ResidualUnitStep):
            handed = step.hand_on(handed, own)
        else:
            handed = Handed(step(handed.x, own))
    return handed.x


def lengths_through(steps: Sequence[Step], lengths: Tensor) -> list[Tensor]:
    """Return the lengths [B] of what each step is given, when the first is given `lengths`."""
    found = []
    for step in steps:
        found.append(lengths)
        lengths = step.output_lengths(lengths)
    return found


def program(modules: Sequence[nn.Module], dtype: torch.dtype, form: Form = "direct") -> list[Step]:
    """Turn a run of reference modules into steps; a Snake is taken into the convolution behind it.

    dtype: of the weights. form: of upsamplings and residual units.
    """
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
            steps.append(UpsampleStep.of(alpha, module, dtype, form))
            alpha = None
        elif isinstance(module, reference.ResidualUnit):
            steps.append(ResidualUnitStep.of(module, dtype, form))
        elif isinstance(module, reference.ConvNeXtBlock):
            steps.append(ConvNeXtStep.of(module, dtype))
        elif isinstance(module, nn.Tanh):
            last = steps[-1]
            assert isinstance(last, ConvStep)
            last.activation = "tanh"
        else:  # a block of blocks
            inner = getattr(module, "block", module)
            assert isinstance(inner, nn.Sequential), f"engine: no step for {type(module).__name__}"
            steps.extend(program(list(inner), dtype, form))
    return steps
