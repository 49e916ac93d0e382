"""w2v-BERT's layers on the CPU, with their weights packed once: transformers' maths in fewer passes.

A layer of the released model is a feed-forward, self-attention with learned biases per clipped distance, a convolution
and another feed-forward, each behind a LayerNorm and added to what it was given. Against transformers' own forward:
the distances' products, 73 per query, are looked up, where it multiplies each query with a vector per key; the three
projections of attention's input are one; weights lie as oneDNN reads them. LayerNorms, their inputs and the sums are
float32. On one 10 s clip (2 threads of an AMD EPYC, Zen 4, bfloat16) the distances of a layer took 33 ms there and take
2.7 ms, its linear layers 70 and 60 ms; torch's fused attention took 8.9 ms where two products and a softmax take 4.9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = 512  # that oneDNN is told to expect when it packs a weight; any number of rows is then right


class _Linear:
    """A linear layer with float32 or bfloat16 weights; `swish`: behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, swish: bool = False) -> None:
        weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.swish = dtype, swish
        self.packed, self.weight = _pack(weight), weight
        if self.packed is not None:
            self.weight = weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.packed is not None:
            after = "swish" if self.swish else "none"
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, after, [], "")
            return y
        y = F.linear(x, self.weight, self.bias)
        return F.silu(y) if self.swish else y


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
    def __init__(self, norm: nn.LayerNorm, module: Any, dtype: torch.dtype) -> None:
        self.norm = _Norm(norm)
        inner, outer = module.intermediate_dense, module.output_dense
        self.inner = _Linear(inner.weight, inner.bias, dtype, swish=True)
        self.outer = _Linear(outer.weight, outer.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.add(x, self.outer(self.inner(self.norm(x))), alpha=0.5)


class _Attention:
    def __init__(self, norm: nn.LayerNorm, module: Any, dtype: torch.dtype) -> None:
        self.norm = _Norm(norm)
        parts = (module.linear_q, module.linear_k, module.linear_v)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        self.project = _Linear(weight, bias, dtype)
        self.out = _Linear(module.linear_out.weight, module.linear_out.bias, dtype)
        self.heads, self.size = module.num_heads, module.head_size
        self.distances = (module.distance_embedding.weight.detach() * self.size**-0.5).to(dtype).t().contiguous()

    def __call__(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        batch, steps, _ = x.shape
        q, k, v = self.project(self.norm(x)).view(batch, steps, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        bias = torch.matmul(q, self.distances).gather(3, places.expand(batch, self.heads, steps, steps))
        if mask is not None:
            bias = bias.masked_fill(mask, torch.finfo(bias.dtype).min)  # finite: a clip of no frames has no key
        flat = (batch * self.heads, steps, -1)
        scores = torch.baddbmm(bias.view(flat), q.reshape(flat), k.reshape(flat).mT, alpha=self.size**-0.5)
        heard = torch.bmm(scores.softmax(-1), v.reshape(flat)).view(batch, self.heads, steps, self.size)
        return x + self.out(heard.transpose(1, 2).reshape(batch, steps, -1))


class _Convolution:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.norm, self.inner_norm = _Norm(module.layer_norm), _Norm(module.depthwise_layer_norm)
        self.expand = _Linear(module.pointwise_conv1.weight[:, :, 0], None, dtype)
        self.contract = _Linear(module.pointwise_conv2.weight[:, :, 0], None, dtype)
        self.depthwise = module.depthwise_conv.weight.detach().to(dtype)  # [C, 1, K]

    def __call__(self, x: Tensor, outside: Tensor | None) -> Tensor:
        hidden = self.norm(x)
        if outside is not None:
            hidden = hidden.masked_fill(outside, 0.0)
        hidden = F.glu(self.expand(hidden), dim=-1)
        hidden = F.pad(hidden.transpose(1, 2), (self.depthwise.shape[2] - 1, 0))
        hidden = F.conv1d(hidden, self.depthwise, groups=hidden.shape[1])
        hidden = self.inner_norm(hidden.transpose(1, 2).to(torch.float32))
        return x + self.contract(F.silu(hidden))


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.first = _FeedForward(layer.ffn1_layer_norm, layer.ffn1, dtype)
        self.attention = _Attention(layer.self_attn_layer_norm, layer.self_attn, dtype)
        self.convolution = _Convolution(layer.conv_module, dtype)
        self.last = _FeedForward(layer.ffn2_layer_norm, layer.ffn2, dtype)
        self.norm = _Norm(layer.final_layer_norm)

    def __call__(self, x: Tensor, places: Tensor, mask: Tensor | None, outside: Tensor | None) -> Tensor:
        x = self.attention(self.first(x), places, mask)
        return self.norm(self.last(self.convolution(x, outside)))


class PackedLayers:
    """A Wav2Vec2BertModel's feature projection and layers, all of them, on the CPU.

    Args:
        model: in eval mode, of a configuration that `takes` takes; it is not looked at again.
        dtype: of weights and products, float32 or bfloat16; what lies between them is float32.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        config, projection = model.config, model.feature_projection
        self.norm = _Norm(projection.layer_norm)
        self.project = _Linear(projection.projection.weight, projection.projection.bias, dtype)
        self.reach = config.left_max_position_embeddings, config.right_max_position_embeddings
        self.layers = [_Layer(layer, dtype) for layer in model.encoder.layers]

    @staticmethod
    def takes(config: Any) -> bool:
        """Whether a model of this configuration has the layers that are known here."""
        return config.position_embeddings_type == "relative_key" and config.hidden_act in ("swish", "silu")

    def __call__(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute [B, T, C] float32 from features [B, T, 160] and a mask [B, T], 1 where they are valid."""
        x = self.project(self.norm(input_features.to(torch.float32))).to(torch.float32)
        valid = attention_mask.bool()
        mask = outside = None
        if not bool(valid.all()):
            mask, outside = ~valid[:, None, None, :], ~valid[:, :, None]
            x = x.masked_fill(outside, 0.0)
        at = torch.arange(x.shape[1])
        left, right = self.reach
        places = (at - at[:, None]).clamp(-left, right) + left
        for layer in self.layers:
            x = layer(x, places, mask, outside)
        return x
