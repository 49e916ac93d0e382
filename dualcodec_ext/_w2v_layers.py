"""w2v-BERT's layers on the CPU, with their weights packed once: transformers' maths in fewer passes.

A layer of the released model is a feed-forward, self-attention with learned biases per clipped distance, a convolution
and another feed-forward, each behind a LayerNorm and added to what it was given. Against transformers' own forward:
the three projections of attention's input are one, and all else are the kernels of kernels/conformer, which has their
numbers. Linear layers are oneDNN's where it is faster; without the compiled module what lies between them is plain
torch, the kernels' definition. LayerNorms, the sums and attention's scores are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .build import load_module

_ROWS = 512  # that oneDNN is told to expect when it packs a weight; any number of rows is then right


class _Linear:
    """A linear layer with float32 or bfloat16 weights; `swish`: behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, swish: bool = False) -> None:
        weight = weight.detach().to(dtype).contiguous()
        self.dtype, self.swish, self.columns = dtype, swish, weight.shape[0]
        self.own = _own(weight)
        # The kernel adds it to float32 sums.
        self.bias = None if bias is None else bias.detach().to(dtype if self.own is None else torch.float32)
        self.packed, self.weight = None if self.own is not None else _pack(weight), weight
        if self.packed is not None or self.own is not None:
            self.weight = weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.own is not None:
            z: Tensor = torch.ops.dualcodec_ext.conformer_linear(x, self.own, self.bias, self.columns, self.swish)
            return z
        if self.packed is not None:
            after = "swish" if self.swish else "none"
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, after, [], "")
            return y
        y = F.linear(x, self.weight, self.bias)
        return F.silu(y) if self.swish else y

    def add_to(self, total: Tensor, x: Tensor, alpha: float) -> Tensor | None:
        """Add alpha * the layer's output to `total`, float32, in place; or return the output where that is not done."""
        if self.own is None:
            return self(x)
        torch.ops.dualcodec_ext.conformer_linear_add(total, x.to(self.dtype), self.own, self.bias, alpha)
        return None


def _own(weight: Tensor) -> Tensor | None:
    """Lay a weight out as conformer_linear reads it; None where that takes it not, or oneDNN is faster.

    Below AVX-512 the kernel has not been measured, nor for bfloat16 without its products.
    """
    module = load_module()
    if module is None or _kernel("conformer_linear") is None or weight.shape[0] % 16 or weight.shape[1] % 2:
        return None
    half = weight.dtype == torch.bfloat16
    if module.active_isa() not in (*(() if half else ("avx512",)), "avx512_bf16", "amx_bf16"):
        return None
    packed: Tensor = torch.ops.dualcodec_ext.pack_conv1d(weight[..., None])
    return packed


def _pack(weight: Tensor) -> Tensor | None:
    """Lay a weight out as oneDNN reads it; None where this torch can't."""
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "swish", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return packed


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.weight, self.bias, self.eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _FeedForward:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        inner, outer = module.intermediate_dense, module.output_dense
        self.inner = _Linear(inner.weight, inner.bias, dtype, swish=True)
        self.outer = _Linear(outer.weight, outer.bias, dtype)

    def __call__(self, x: Tensor, total: Tensor) -> Tensor | None:
        return self.outer.add_to(total, self.inner(x), 0.5)


class _Attention:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        parts = (module.linear_q, module.linear_k, module.linear_v)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        self.project = _Linear(weight, bias, dtype)
        self.out = _Linear(module.linear_out.weight, module.linear_out.bias, dtype)
        self.heads, self.size = module.num_heads, module.head_size
        self.left = module.left_max_position_embeddings
        self.distances = module.distance_embedding.weight.detach().to(dtype).contiguous()  # [left + 1 + right, D]

    def __call__(self, x: Tensor, valid: Tensor | None, total: Tensor) -> Tensor | None:
        attend = _kernel("conformer_attention") or _attend
        heard = attend(self.project(x), self.distances, self.heads, self.left, valid)
        return self.out.add_to(total, heard, 1.0)


def _attend(projected: Tensor, distances: Tensor, heads: int, left: int, valid: Tensor | None) -> Tensor:
    batch, steps, width = projected.shape
    size = width // 3 // heads
    q, k, v = projected.view(batch, steps, 3, heads, size).permute(2, 0, 3, 1, 4)
    at = torch.arange(steps)
    places = (at - at[:, None]).clamp(-left, len(distances) - 1 - left) + left
    bias = torch.matmul(q, distances.t() * size**-0.5).gather(3, places.expand(batch, heads, steps, steps))
    if valid is not None:  # finite: a clip of no frames has no key
        bias = bias.masked_fill(~valid[:, None, None, :], torch.finfo(bias.dtype).min)
    flat = (batch * heads, steps, -1)
    scores = torch.baddbmm(bias.view(flat), q.reshape(flat), k.reshape(flat).mT, alpha=size**-0.5)
    heard = torch.bmm(scores.softmax(-1), v.reshape(flat)).view(batch, heads, steps, size)
    return heard.transpose(1, 2).reshape(batch, steps, -1)


class _Convolution:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.norm = _Norm(module.depthwise_layer_norm)
        self.expand = _Linear(module.pointwise_conv1.weight[:, :, 0], None, dtype)
        self.contract = _Linear(module.pointwise_conv2.weight[:, :, 0], None, dtype)
        self.depthwise = module.depthwise_conv.weight.detach()[:, 0].t().contiguous()  # [K, C]

    def __call__(self, x: Tensor, valid: Tensor | None, total: Tensor) -> Tensor | None:
        convolve = _kernel("conformer_convolution") or _convolve
        norm = self.norm
        found = convolve(self.expand(x), self.depthwise, norm.weight, norm.bias, norm.eps, valid)
        return self.contract.add_to(total, found, 1.0)


def _convolve(
    x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float, valid: Tensor | None
) -> Tensor:
    hidden = F.glu(x, dim=-1)
    if valid is not None:
        hidden = hidden.masked_fill(~valid[:, :, None], 0.0)
    hidden = F.pad(hidden.transpose(1, 2), (weight.shape[0] - 1, 0))
    hidden = F.conv1d(hidden, weight.t()[:, None].to(x.dtype), groups=weight.shape[1])
    hidden = F.layer_norm(hidden.transpose(1, 2).to(ln_weight.dtype), ln_weight.shape, ln_weight, ln_bias, eps)
    return F.silu(hidden).to(x.dtype)


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.first, self.last = _FeedForward(layer.ffn1, dtype), _FeedForward(layer.ffn2, dtype)
        self.attention = _Attention(layer.self_attn, dtype)
        self.convolution = _Convolution(layer.conv_module, dtype)
        before = (
            layer.ffn1_layer_norm,
            layer.self_attn_layer_norm,
            layer.conv_module.layer_norm,
            layer.ffn2_layer_norm,
        )
        self.norms = [_Norm(norm) for norm in before]
        self.norm = _Norm(layer.final_layer_norm)

    def __call__(self, x: Tensor, y: Tensor, valid: Tensor | None, following: _Norm | None) -> Tensor:
        """Compute the layer.

        Args:
            x: its input, [B, T, C] float32, overwritten with its output where a layer follows.
            y: x after the layer's first norm, in the weights' dtype.
            valid: [B, T] bool; None: every step is.
            following: the first norm of the next layer.

        Returns:
            The output after the norm that follows, in the weights' dtype; without one the output itself, in float32.
        """
        norms, dtype = self.norms, self.dtype
        y = _add_norm(x, self.first(y, x), 0.5, norms[1], dtype)
        y = _add_norm(x, self.attention(y, valid, x), 1.0, norms[2], dtype)
        y = _add_norm(x, self.convolution(y, valid, x), 1.0, norms[3], dtype)
        return _add_norm(x, self.last(y, x), 0.5, self.norm, dtype if following else torch.float32, following)


def _add_norm(
    x: Tensor, addend: Tensor | None, alpha: float, norm: _Norm, dtype: torch.dtype, following: _Norm | None = None
) -> Tensor:
    """Add alpha * addend to x, in place, and return x normed, in `dtype`.

    With `following`, which has the same eps, x becomes its norm and what is returned is that one's norm.
    """
    if (kernel := _kernel("conformer_norm")) is not None:
        more = (None, None) if following is None else (following.weight, following.bias)
        y: Tensor = kernel(x, addend, alpha, norm.weight, norm.bias, norm.eps, dtype, *more)
        return y
    if addend is not None:
        x.add_(addend, alpha=alpha)
    if following is not None:
        norm, _ = following, x.copy_(norm(x))
    return norm(x).to(dtype)


def _kernel(name: str) -> Any:
    """One of the ops of csrc/conformer.cpp; None without the compiled module."""
    return None if load_module() is None else getattr(torch.ops.dualcodec_ext, name)


class PackedLayers:
    """A Wav2Vec2BertModel's feature projection and layers, all of them, on the CPU.

    Args:
        model: in eval mode, of a configuration that `takes` takes; it is not looked at again.
        dtype: of weights and products, float32 or bfloat16; what lies between them is float32.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        projection = model.feature_projection
        self.norm = _Norm(projection.layer_norm)
        self.project = _Linear(projection.projection.weight, projection.projection.bias, dtype)
        self.layers = [_Layer(layer, dtype) for layer in model.encoder.layers]

    @staticmethod
    def takes(config: Any) -> bool:
        """Whether a model of this configuration has the layers that are known here."""
        return config.position_embeddings_type == "relative_key" and config.hidden_act in ("swish", "silu")

    def __call__(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute [B, T, C] float32 from features [B, T, 160] and a mask [B, T], 1 where they are valid."""
        x = self.project(self.norm(input_features.to(torch.float32))).to(torch.float32)
        mask = attention_mask.bool()
        valid = None if bool(mask.all()) else mask
        if valid is not None:
            x = x.masked_fill(~valid[:, :, None], 0.0)
        following = [layer.norms[0] for layer in self.layers]
        y = _add_norm(x, None, 1.0, following[0], self.layers[0].dtype)
        for layer, norm in zip(self.layers, [*following[1:], None], strict=True):
            y = layer(x, y, valid, norm)
        return y
