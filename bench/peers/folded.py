"""The codec with weight norm folded away, as plain torch modules in two graph forms.

`form="1d"` is what folding alone gives: Conv1d on [B, C, T]. `form="2d"` rewrites every convolution to Conv2d
on [B, C, 1, T] with channels-last memory, the form that oneDNN, ONNX Runtime and OpenVINO have their best
kernels for. Both are built from the layer list (bench/program.py) and a state dict, so they share no code
with the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.program import ConvNeXt, Layer, Program, Quantizer, Unit, Upsample

State = Mapping[str, Tensor]


def folded_weight(state: State, key: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of `key` in float64, weight norm (over all but the first dim) multiplied out where
    there is one."""
    bias = state[f"{key}.bias"].double()
    if f"{key}.weight" in state:
        return state[f"{key}.weight"].double(), bias
    gain, direction = state[f"{key}.weight_g"].double(), state[f"{key}.weight_v"].double()
    norm = direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (direction.dim() - 1))
    return direction * (gain / norm), bias


class Snake(nn.Module):
    def __init__(self, alpha: Tensor, form: str) -> None:
        super().__init__()
        shape = (1, -1, 1, 1) if form == "2d" else (1, -1, 1)
        self.alpha = nn.Parameter(alpha.double().reshape(shape))
        self.reciprocal = nn.Parameter((alpha.double() + 1e-9).reciprocal().reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reciprocal * torch.sin(self.alpha * x).pow(2)


class FoldedConv(nn.Module):
    """A convolution with explicit left and right zeros, which are the module's own padding where both are
    equal."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        form: str,
        *,
        stride: int,
        dilation: int,
        left: int,
        right: int,
        groups: int = 1,
    ) -> None:
        super().__init__()
        own = left if left == right else 0
        self.extra = (0, 0) if left == right else (left, right)
        c_out, c_in, taps = weight.shape[0], weight.shape[1] * groups, weight.shape[2]
        if form == "2d":
            self.conv: nn.Module = nn.Conv2d(
                c_in, c_out, (1, taps), (1, stride), (0, own), (1, dilation), groups, dtype=weight.dtype
            )
            weight = weight[:, :, None, :]
        else:
            self.conv = nn.Conv1d(c_in, c_out, taps, stride, own, dilation, groups, dtype=weight.dtype)
        _set(self.conv, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.extra != (0, 0):
            x = F.pad(x, self.extra)
        return self.conv(x)


class FoldedUpsample(nn.Module):
    def __init__(self, layer: Upsample, weight: Tensor, bias: Tensor, form: str) -> None:
        super().__init__()
        self.layer = layer
        stride = layer.stride
        if layer.mode == "transposed":
            # Upstream crops both sides alike, which is ConvTranspose's own padding.
            assert layer.left == layer.right
            if form == "2d":
                self.conv: nn.Module = nn.ConvTranspose2d(
                    layer.c_in, layer.c_out, (1, 2 * stride), (1, stride), (0, layer.left), dtype=weight.dtype
                )
                weight = weight[:, :, None, :]
            else:
                self.conv = nn.ConvTranspose1d(
                    layer.c_in, layer.c_out, 2 * stride, stride, layer.left, dtype=weight.dtype
                )
            _set(self.conv, weight, bias)
        else:
            self.conv = FoldedConv(weight, bias, form, stride=1, dilation=1, left=layer.left, right=layer.right)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.mode == "repeat":
            x = x.repeat_interleave(self.layer.stride, dim=-1)
        return self.conv(x)


class FoldedUnit(nn.Module):
    def __init__(self, unit: Unit, state: State, form: str) -> None:
        super().__init__()
        left, right = unit.padding
        wide, narrow = folded_weight(state, unit.wide), folded_weight(state, unit.narrow)
        self.body = nn.Sequential(
            Snake(state[unit.alpha1], form),
            FoldedConv(*wide, form, stride=1, dilation=unit.dilation, left=left, right=right),
            Snake(state[unit.alpha2], form),
            FoldedConv(*narrow, form, stride=1, dilation=1, left=0, right=0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FoldedConvNeXt(nn.Module):
    def __init__(self, layer: ConvNeXt, state: State, form: str) -> None:
        super().__init__()
        self.form = form
        self.depthwise = FoldedConv(
            *folded_weight(state, f"{layer.key}.dwconv"),
            form,
            stride=1,
            dilation=1,
            left=layer.left,
            right=layer.right,
            groups=layer.channels,
        )
        self.norm = nn.LayerNorm(layer.channels, eps=1e-6, dtype=torch.float64)
        self.up = nn.Linear(layer.channels, layer.hidden, dtype=torch.float64)
        self.down = nn.Linear(layer.hidden, layer.channels, dtype=torch.float64)
        _set(self.norm, state[f"{layer.key}.norm.weight"], state[f"{layer.key}.norm.bias"])
        _set(self.up, *folded_weight(state, f"{layer.key}.pwconv1"))
        _set(self.down, *folded_weight(state, f"{layer.key}.pwconv2"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).movedim(1, -1)  # [B, (1,) T, C]: no copy in the 2d form, which is channels-last
        y = self.down(F.gelu(self.up(self.norm(y))))
        return x + y.movedim(-1, 1)


def _set(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        assert module.get_parameter(name).shape == value.shape
        setattr(module, name, nn.Parameter(value.double().contiguous(), requires_grad=False))


def _layer_modules(layer: Layer, state: State, form: str) -> list[nn.Module]:
    if isinstance(layer, Unit):
        return [FoldedUnit(layer, state, form)]
    if isinstance(layer, ConvNeXt):
        return [FoldedConvNeXt(layer, state, form)]
    modules: list[nn.Module] = [] if layer.alpha is None else [Snake(state[layer.alpha], form)]
    weight, bias = folded_weight(state, layer.key)
    if isinstance(layer, Upsample):
        return [*modules, FoldedUpsample(layer, weight, bias, form)]
    modules.append(
        FoldedConv(
            weight,
            bias,
            form,
            stride=layer.stride,
            dilation=layer.dilation,
            left=layer.left,
            right=layer.right,
        )
    )
    if layer.tanh:
        modules.append(nn.Tanh())
    return modules


def fold_layers(layers: Iterable[Layer], state: State, form: str) -> nn.Sequential:
    """The layers as one module, in float64."""
    return nn.Sequential(*[m for layer in layers for m in _layer_modules(layer, state, form)])


class FoldedQuantizer(nn.Module):
    """Stage by stage on [B, F, C] rows, where every projection is a linear layer."""

    def __init__(self, quantizer: Quantizer, state: State) -> None:
        super().__init__()
        self.stages = len(quantizer.dims)
        for i in range(self.stages):
            at = f"{quantizer.key}.quantizers.{i}"
            book = state[f"{at}.codebook.weight"].double()
            normal = F.normalize(book)
            in_weight, in_bias = folded_weight(state, f"{at}.in_proj")
            out_weight, out_bias = folded_weight(state, f"{at}.out_proj")
            for name, value in {
                "book": book,
                "doubled": 2 * normal.t(),
                "square": normal.pow(2).sum(1),
                "in_weight": in_weight[..., 0],
                "in_bias": in_bias,
                "out_weight": out_weight[..., 0],
                "out_bias": out_bias,
            }.items():
                self.register_parameter(f"{name}{i}", nn.Parameter(value.contiguous()))

    def _of(self, name: str, i: int) -> Tensor:
        return self.get_parameter(f"{name}{i}")

    def lookup(self, codes: Tensor) -> Tensor:
        """codes [B, q, F] -> [B, F, C]."""
        total = None
        for i in range(codes.shape[1]):
            rows = F.linear(
                F.embedding(codes[:, i], self._of("book", i)),
                self._of("out_weight", i),
                self._of("out_bias", i),
            )
            total = rows if total is None else total + rows
        assert total is not None
        return total

    def search(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, F, C] -> codes [B, Q, F] and the quantised sum [B, F, C]."""
        residual, codes = z, []
        for i in range(self.stages):
            e = F.normalize(F.linear(residual, self._of("in_weight", i), self._of("in_bias", i)), dim=-1)
            codes.append((e @ self._of("doubled", i) - self._of("square", i)).argmax(-1))
            rows = F.embedding(codes[-1], self._of("book", i))
            residual = residual - F.linear(rows, self._of("out_weight", i), self._of("out_bias", i))
        return torch.stack(codes, dim=1), z - residual


class FoldedDecoder(nn.Module):
    """(semantic codes [B, 1, F], acoustic codes [B, Q, F]) -> audio [B, 1, S]."""

    def __init__(self, program: Program, state: State, form: str) -> None:
        super().__init__()
        self.form = form
        self.semantic_vq = FoldedQuantizer(program.semantic_vq, state)
        self.rvq = FoldedQuantizer(program.rvq, state)
        self.semantic = fold_layers(program.semantic_decoder, state, form)
        self.decoder = fold_layers(program.decoder, state, form)

    def forward(self, semantic_codes: Tensor, acoustic_codes: Tensor) -> Tensor:
        x = self.semantic(enter(self.semantic_vq.lookup(semantic_codes), self.form))
        x = x + enter(self.rvq.lookup(acoustic_codes), self.form)
        y = self.decoder(x)
        return y[:, :, 0] if self.form == "2d" else y


class FoldedEncoder(nn.Module):
    """(audio [B, 1, S], features [B, 1024, F]) -> semantic codes [B, 1, F], acoustic codes [B, Q, F]."""

    def __init__(self, program: Program, state: State, form: str) -> None:
        super().__init__()
        self.form = form
        self.semantic_encoder = fold_layers(program.semantic_encoder, state, form)
        self.semantic_vq = FoldedQuantizer(program.semantic_vq, state)
        self.semantic = fold_layers(program.semantic_decoder, state, form)
        self.encoder = fold_layers(program.encoder, state, form)
        self.rvq = FoldedQuantizer(program.rvq, state)

    def forward(self, audio: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "2d":
            audio, features = audio[:, :, None], features[:, :, None]
        codes, quantized = self.semantic_vq.search(leave(self.semantic_encoder(features)))
        latent = leave(self.encoder(audio)) - leave(self.semantic(enter(quantized, self.form)))
        return codes, self.rvq.search(latent)[0]


def enter(rows: Tensor, form: str) -> Tensor:
    """[B, T, C] -> the form's layout; no copy in the 2d form, whose memory is channels-last."""
    x = rows.transpose(1, 2)
    return x[:, :, None] if form == "2d" else x


def leave(x: Tensor) -> Tensor:
    """The form's layout -> [B, T, C]."""
    return (x[:, :, 0] if x.dim() == 4 else x).transpose(1, 2)


def finish(module: nn.Module, form: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Cast the float64 module and lay its weights out as its form likes them."""
    module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last) if form == "2d" else module
