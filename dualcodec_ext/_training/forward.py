"""The training forward, three ways: plain modules, the package's differentiable ops, or channels-last PyTorch.

All three compute `DualCodec.forward`. Channels-last is the fastest to train with on a CPU: one-row 2-d convolutions in
that layout, an upsampling whose taps are folded per output phase, and a Snake whose two directions are one pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, reference
from ..ops._common import asked_backend
from ..reference.dac import pad_to_length
from ..reference.layers import CausalConv1d, CausalUpsample, ConvNeXtBlock, WNConv1d, WNConvTranspose1d, inner_conv

WAYS = ("auto", "reference", "ops", "channels_last")


class Output(NamedTuple):
    """What the training forward gives; the stages' lists begin with the semantic one."""

    x: Tensor  # [B, 1, S]
    codes: list[Tensor]  # [B, F] each
    latents: list[Tensor]  # [B, D, F] each: what was searched for, without gradient
    commitment: Tensor
    codebook: Tensor


class Forward:
    """`DualCodec.forward` for training.

    Args:
        model: in training mode.
        way: "ops" (the differentiable ops), "channels_last", "reference" (plain modules), or "auto", the ops. Where
            backend("reference") is asked for it is the reference, whatever the way.
        bypass: how often a batch gets no acoustic codebook, as `bypass_quantize_rate`.
        odds: of 0, 1, ... acoustic codebooks where their number is drawn; empty: all alike.
    """

    def __init__(
        self, model: reference.DualCodec, way: str = "auto", bypass: float = 0.0, odds: Sequence[float] = ()
    ) -> None:
        way = "reference" if asked_backend() == "reference" else "ops" if way == "auto" else way
        self.model, self.way, self.bypass = model, way, bypass
        self._odds = torch.tensor(odds, dtype=torch.float64) if odds else None
        self._run: Callable[[Iterable[nn.Module], Tensor], Tensor]
        self._run = {"reference": _modules, "ops": _ops, "channels_last": _channels_last}[way]
        self._semantic = _ops if way == "ops" else _modules

    def draw(self, batch: int) -> Tensor:
        """Draw how many acoustic codebooks each item of a batch is decoded from, [B] int64, by torch's generator.

        A fraction `quantizer_dropout` of the items gets from none to all, the others all; with the odds of `bypass` the
        whole batch gets none.
        """
        counts = self.model.dac.quantizer._counts(batch, None, True, self._odds)
        return counts * 0 if float(torch.rand(())) < self.bypass else counts

    def __call__(self, audio: Tensor, features: Tensor, counts: Tensor, quantize: bool = True) -> Output:
        """Run it.

        Args:
            audio: [B, 1, S], S a multiple of the hop.
            features: [B, C, S / hop].
            counts: [B] int64, acoustic codebooks per item. Those past it stay out of the sum and the losses.
            quantize: whether the acoustic latent goes through its codebooks, else as it is where counts is not 0.
        """
        model = self.model
        quantized, codes, latents, commitment, codebook, _ = model.semantic_vq(
            self._semantic(model.convnext_encoder, features)
        )
        total = self._semantic(model.convnext_decoder, quantized) if model.decode_semantic_for_codec else quantized
        residual = self._run(model.dac.encoder.block, audio) - total
        all_codes, all_latents = [codes[:, 0]], [latents]
        if not quantize:
            total = total + residual * (counts > 0).to(residual)[:, None, None]
        for i, stage in enumerate(model.dac.quantizer.stages() if quantize else ()):
            chosen, commitment_i, codebook_i, codes_i, z_e = stage(residual)
            used = (i < counts).to(chosen)  # [B]
            total, residual = total + chosen * used[:, None, None], residual - chosen
            commitment = commitment + (commitment_i * used).mean()
            codebook = codebook + (codebook_i * used).mean()
            all_codes.append(codes_i)
            all_latents.append(z_e.detach())
        x = pad_to_length(self._run(model.dac.decoder.model, total), audio.shape[-1])
        return Output(x, all_codes, all_latents, commitment, codebook)


def _modules(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _ops(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    alpha: Tensor | None = None
    for module in modules:
        if isinstance(module, reference.Snake1d):
            alpha = module.alpha.reshape(-1)
        elif isinstance(module, WNConv1d | CausalConv1d):
            c = inner_conv(module)
            x = ops.snake_conv1d(x, c.weight(), c.bias, alpha, stride=c.stride, dilation=c.dilation, padding=c.padding)
            alpha = None
        elif isinstance(module, CausalUpsample):
            assert alpha is not None
            c = inner_conv(module.conv)
            x = ops.snake_upsample1d(
                x, alpha, c.weight(), c.bias, stride=module.stride, mode="repeat", padding=module.padding
            )
            alpha = None
        elif isinstance(module, WNConvTranspose1d):
            assert alpha is not None
            stride, padding = module.stride, module.padding
            x = ops.snake_upsample1d(
                x, alpha, module.weight(), module.bias, stride=stride, mode="transposed", padding=padding
            )
            alpha = None
        elif isinstance(module, reference.ResidualUnit):
            snake1, conv1, snake2, conv2 = module.block
            c1, c2 = inner_conv(conv1), inner_conv(conv2)
            assert isinstance(snake1, reference.Snake1d) and isinstance(snake2, reference.Snake1d)
            x = ops.residual_unit(
                x,
                snake1.alpha.reshape(-1),
                c1.weight(),
                c1.bias,
                snake2.alpha.reshape(-1),
                c2.weight(),
                c2.bias,
                dilation=module.dilation,
                causal=module.causal,
            )
        elif isinstance(module, nn.Tanh):
            x = torch.tanh(x)
        elif isinstance(module, ConvNeXtBlock):
            y = ops.causal_dwconv1d(
                x,
                module.dwconv.weight[:, 0],
                module.dwconv.bias,
                padding=(6, 0) if module.is_causal else (3, 3),
                ln_weight=module.norm.weight,
                ln_bias=module.norm.bias,
                eps=module.norm.eps,
            )
            x = x + module.pwconv2(module.act(module.pwconv1(y.transpose(1, 2)))).transpose(1, 2)
        else:  # a block of blocks
            inner = module.block
            assert isinstance(inner, nn.Sequential)
            x = _ops(inner, x)
    return x


# Channels-last: x is [B, C, 1, T] with stride 1 on C. --------------------------------------------------------------


def _channels_last(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    return _walk(modules, x[:, :, None].contiguous(memory_format=torch.channels_last))[:, :, 0]


def _walk(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        if isinstance(module, reference.Snake1d):
            x = _snake(x, module.alpha)
        elif isinstance(module, WNConv1d | CausalConv1d):
            x = _conv(x, inner_conv(module))
        elif isinstance(module, CausalUpsample):
            x = _upsample(x, module)
        elif isinstance(module, reference.ResidualUnit):
            x = x + _walk(module.block, x)
        elif isinstance(module, nn.Tanh):
            x = torch.tanh(x)
        elif isinstance(module, WNConvTranspose1d):
            x = module(x[:, :, 0])[:, :, None].contiguous(memory_format=torch.channels_last)
        else:
            inner = module.block
            assert isinstance(inner, nn.Sequential)
            x = _walk(inner, x)
    return x


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], stride: int, dilation: int) -> Tensor:
    weight = weight[:, :, None].contiguous(memory_format=torch.channels_last)
    if sum(padding):
        x = F.pad(x, (*padding, 0, 0))
    return F.conv2d(x, weight, bias, stride=(1, stride), dilation=(1, dilation))


def _conv(x: Tensor, conv: WNConv1d) -> Tensor:
    return _conv2d(x, conv.weight(), conv.bias, conv.padding, conv.stride, conv.dilation)


def _upsample(x: Tensor, module: CausalUpsample) -> Tensor:
    """Repeat and convolve without the repeated signal: per output phase p, tap k falls on frame (p + k - left) // s."""
    stride, conv = module.stride, inner_conv(module.conv)
    weight = conv.weight()  # [Cout, Cin, 2s]
    frame = (torch.arange(stride)[:, None] + torch.arange(2 * stride) - module.padding[0]) // stride  # [s, 2s]
    first, last = int(frame.min()), int(frame.max())
    places = F.one_hot(frame - first, last - first + 1).to(weight)  # [s, 2s, taps]
    folded = torch.einsum("oik,pkj->poij", weight, places).flatten(0, 1)
    y = _conv2d(x, folded, conv.bias.repeat(stride), (-first, last), 1, 1)
    batch, _, _, frames = y.shape
    rows = y.permute(0, 2, 3, 1).reshape(batch, 1, frames * stride, conv.out_channels)
    return rows.permute(0, 3, 1, 2)


def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    batch, channels, _, steps = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    y = _Snake.apply(rows, alpha.reshape(-1))
    return y.reshape(batch, 1, steps, channels).permute(0, 3, 1, 2)


def _snake_forward(x: Tensor, alpha: Tensor) -> Tensor:
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()


def _snake_backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    inverse = (alpha + 1e-9).reciprocal()
    double, sine = torch.sin(2 * alpha * x), torch.sin(alpha * x)
    towards_alpha = grad * (x * double * inverse - sine.square() * inverse.square())
    return grad * (1 + alpha * inverse * double), towards_alpha.sum(0)


class _Snake(torch.autograd.Function):
    """x [N, C], alpha [C]. Each direction is compiled into one pass over the rows where a compiler is there."""

    forward_pass: Callable[..., Any] = staticmethod(_snake_forward)
    backward_pass: Callable[..., Any] = staticmethod(_snake_backward)

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, alpha)
        return _Snake.forward_pass(x, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, alpha = ctx.saved_tensors
        return _Snake.backward_pass(grad.contiguous(), x, alpha)


def compile_snake() -> bool:
    """Compile the Snake of the channels-last way with torch.compile; return whether that worked."""
    try:
        allow_recompiling()
        forward, backward = (torch.compile(call, dynamic=True) for call in (_snake_forward, _snake_backward))
        x, alpha = torch.randn(8, 4), torch.ones(4)
        backward(forward(x, alpha), x, alpha)
    except Exception:  # no compiler, or one that fails: the eager passes are as right, and slower
        return False
    _Snake.forward_pass, _Snake.backward_pass = forward, backward
    return True


def allow_recompiling() -> None:
    """Let torch.compile keep an entry per thread and kind of shape; the setting is each thread's own."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
