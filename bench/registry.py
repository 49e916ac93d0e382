"""One row per op and codec shape: inputs, providers, bytes and FLOPs. The shapes come from the layer list of
a preset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualcodec_ext import testing
from dualcodec_ext.ops._choice import TRITON_OPS
from dualcodec_ext.reference import DualCodec, ResidualVectorQuantize
from dualcodec_ext.reference import ops as reference_ops

from .correctness import CodesCheck, Error, WaveCheck, exact_math
from .peers import faiss_peer
from .peers.base import Call, Unavailable
from .peers.folded import (
    FoldedConvNeXt,
    FoldedQuantizer,
    State,
    enter,
    finish,
    fold_layers,
    folded_weight,
    leave,
)
from .peers.torch_peers import compiled_call, module_call
from .program import Conv, ConvNeXt, Layer, Program, Quantizer, Unit, Upsample, walk

OPS = ("rvq_search", "rvq_lookup", "causal_dwconv1d", "snake_conv1d", "snake_upsample1d", "residual_unit")


@dataclass(frozen=True)
class Row:
    """An op at one shape. Arguments are float32 (codes int64); a provider casts what its dtype wants."""

    op: str
    where: str  # the part of the codec that it is taken from
    shape: str
    args: tuple[Tensor | None, ...]  # the op's tensors in order; args[0] is the input
    options: dict[str, Any]
    flops: float
    touched_elements: int  # read and written once each, weights included
    frames: int  # codec frames that one call covers
    layer: Layer | Quantizer
    state: State
    quantizer_tensors: tuple[Tensor, ...] = ()  # rvq_search's weights

    @property
    def name(self) -> str:
        return f"{self.op} {self.where} {self.shape}"

    @property
    def device(self) -> str:
        assert self.args[0] is not None
        return self.args[0].device.type

    @property
    def steps(self) -> int:
        """Of all items together: what the choice of a family goes by."""
        assert self.args[0] is not None
        return self.args[0].shape[0] * self.args[0].shape[-1]

    def to(self, device: str) -> Row:
        """The row with its arguments on a device; peers are built from the state wherever that is."""

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return replace(
            self,
            args=tuple(map(moved, self.args)),
            options={k: moved(v) for k, v in self.options.items()},
            quantizer_tensors=tuple(map(moved, self.quantizer_tensors)),
        )

    def touched_bytes(self, dtype: torch.dtype) -> float:
        size = 8 if self.op == "rvq_lookup" else dtype.itemsize
        return float(self.touched_elements * dtype.itemsize + (size - dtype.itemsize) * self.args[0].numel())

    def cast(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in self.args)

    def input(self, dtype: torch.dtype, channels_last: bool) -> Tensor:
        """args[0] as a provider's call gets it."""
        x = self.args[0]
        assert x is not None
        if not x.is_floating_point():
            return x
        return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x.to(dtype)

    def weights_in(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The other tensors as kernels take them: float32 for every input dtype but float64."""
        return self.cast(torch.float64 if dtype == torch.float64 else torch.float32)[1:]


def _count(*tensors: Tensor | None) -> int:
    return sum(x.numel() for x in tensors if x is not None)


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _alpha(state: State, key: str) -> Tensor:
    return state[key].reshape(-1).float()


def _layer_row(layer: Layer, where: str, steps: int, frames: int, batch: int, state: State) -> Row:
    def folded(key: str) -> tuple[Tensor, Tensor]:
        weight, bias = folded_weight(state, key)
        return weight.float(), bias.float()

    if isinstance(layer, Unit):
        op, channels, c_out = "residual_unit", layer.channels, layer.channels
        args: tuple[Tensor | None, ...] = (
            *(_alpha(state, layer.alpha1), *folded(layer.wide)),
            *(_alpha(state, layer.alpha2), *folded(layer.narrow)),
        )
        options: dict[str, Any] = {"dilation": layer.dilation, "causal": layer.causal}
        shape = f"C={channels} T={steps} d={layer.dilation}"
    elif isinstance(layer, Upsample):
        op, channels, c_out = "snake_upsample1d", layer.c_in, layer.c_out
        args = (_alpha(state, layer.alpha), *folded(layer.key))
        options = {"stride": layer.stride, "mode": layer.mode, "padding": (layer.left, layer.right)}
        shape = f"{channels}->{c_out} T={steps} S={layer.stride}"
    elif isinstance(layer, ConvNeXt):
        op, channels, c_out = "causal_dwconv1d", layer.channels, layer.channels
        weight, bias = folded(f"{layer.key}.dwconv")
        norm = (state[f"{layer.key}.norm.weight"].float(), state[f"{layer.key}.norm.bias"].float())
        args, options = (weight[:, 0].contiguous(), bias), {"padding": (layer.left, layer.right)}
        options |= {"ln_weight": norm[0], "ln_bias": norm[1]}
        shape = f"C={channels} T={steps} K={layer.taps}+LN"
    else:
        op, channels, c_out = "snake_conv1d", layer.c_in, layer.c_out
        args = (*folded(layer.key), None if layer.alpha is None else _alpha(state, layer.alpha))
        options = {"stride": layer.stride, "dilation": layer.dilation, "padding": (layer.left, layer.right)}
        options["activation"] = "tanh" if layer.tanh else "none"
        shape = f"{channels}->{c_out} T={steps} K={layer.taps}" + (f" S={layer.stride}" if layer.stride > 1 else "")
    x = _noise(1, batch, channels, steps)
    flops = 2.0 * layer.channels * layer.taps * steps if isinstance(layer, ConvNeXt) else layer.flops(steps)
    touched = _count(x, *args) + batch * c_out * layer.out_length(steps)
    shape = f"B={batch} {shape}" if batch > 1 else shape
    return Row(op, where, shape, (x, *args), options, batch * flops, touched, batch * frames, layer, state)


def _quantizer_rows(quantizer: Quantizer, where: str, frames: int, batch: int, model: DualCodec) -> Iterator[Row]:
    rvq = model.get_submodule(quantizer.key)
    assert isinstance(rvq, ResidualVectorQuantize)
    weights = rvq.op_tensors(torch.float32)
    tensors, state = tuple(weights.values()), model.state_dict()
    stages, shape = len(quantizer.dims), f"Q={len(quantizer.dims)} N={quantizer.entries} F={frames}"
    shape = f"B={batch} {shape}" if batch > 1 else shape
    z, every = _noise(2, batch, quantizer.channels, frames), batch * frames
    flops, touched = quantizer.search_flops(every), _count(z, *tensors) + stages * every
    yield Row("rvq_search", where, shape, (z, *tensors), {}, flops, touched, every, quantizer, state, tensors)
    codes = torch.randint(quantizer.entries, (batch, stages, frames), generator=torch.Generator().manual_seed(3))
    # Of a codebook only the rows that are looked up.
    touched = _count(codes, *tensors[3:], z) + stages * every * max(quantizer.dims)
    flops, args = quantizer.lookup_flops(every), (codes, *tensors[2:])
    yield Row("rvq_lookup", where, shape, args, {}, flops, touched, every, quantizer, state, tensors)


def rows(
    program: Program,
    model: DualCodec,
    seconds: float,
    *,
    every: bool = False,
    ops: tuple[str, ...] = OPS,
    batch: int = 1,
) -> Iterator[Row]:
    """The rows of a codec, made one at a time.

    Args:
        program: the layers.
        model: the reference with the weights to use.
        seconds: of audio; sets the lengths.
        every: also the residual units of dilations 1 and 9 (same cost, other taps) and repeated blocks.
        ops: names of the ops wanted.
        batch: items of `seconds` each.
    """
    frames, state = program.frames(seconds), model.state_dict()
    parts: tuple[tuple[str, tuple[Layer, ...], int], ...] = (
        ("semantic", program.semantic_encoder + program.semantic_decoder, frames),
        ("encoder", program.encoder, frames * program.hop_samples),
        ("decoder", program.decoder, frames),
    )
    for where, quantizer in (("semantic", program.semantic_vq), ("acoustic", program.rvq)):
        yield from (r for r in _quantizer_rows(quantizer, where, frames, batch, model) if r.op in ops)
    names = {
        Unit: "residual_unit",
        Upsample: "snake_upsample1d",
        ConvNeXt: "causal_dwconv1d",
        Conv: "snake_conv1d",
    }
    for op in OPS:
        if op not in ops:
            continue
        for where, layers, steps in parts:
            seen = set()
            for layer, length, _ in walk(layers, steps):
                if names[type(layer)] != op or (isinstance(layer, Unit) and layer.dilation != 3 and not every):
                    continue
                made = _layer_row(layer, where, length, frames, batch, state)
                if made.shape not in seen or every:
                    seen.add(made.shape)
                    yield made


def reference_call(row: Row, dtype: torch.dtype) -> Call:
    """The plain PyTorch definition in `dtype`."""
    function = getattr(reference_ops, f"{row.op}_ref")
    args = row.cast(dtype)
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in row.options.items()}
    return module_call(lambda *inputs: _first(function(*inputs, **options)), args)


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def has_kernels(op: str, family: str) -> bool:
    """Whether a family has an op at all; every op has compiled kernels."""
    return family != "triton" or op in TRITON_OPS


def has_fast_form(row: Row, dtype: torch.dtype, family: str) -> bool:
    """Whether a fast decoder runs the op otherwise than an exact one."""
    return row.op == "residual_unit" and row.where == "decoder" and dtype == torch.float32 and family == "cpu"


def our_call(row: Row, dtype: torch.dtype, family: str = "auto", fast: bool = False) -> Call:
    """The op on one backend, weights packed as the engine packs them, the input channels-last as it keeps it."""
    from dualcodec_ext import backend, forms, ops, steps
    from dualcodec_ext.ops import packing

    options = {k: v.float() if isinstance(v, Tensor) and dtype != torch.float64 else v for k, v in row.options.items()}
    x, weights = row.input(dtype, channels_last=True), row.weights_in(dtype)

    def kept(i: int) -> Tensor:
        weight = weights[i]
        assert weight is not None
        return weight.to(steps.weight_dtype(dtype, torch.device(row.device)))

    asked: forms.Form = "direct" if row.where != "decoder" else "fast" if fast else "exact"
    form = forms.form_for(asked, dtype, torch.device(row.device))
    with backend(family):
        if row.op == "snake_conv1d":
            options["packed"] = packing.pack_conv1d(kept(0), options["stride"], options["dilation"])
        elif row.op == "residual_unit":
            winograd = forms.unit_products(form, kept(1).shape[0])
            options |= {"winograd": winograd, "packed": packing.pack_residual_unit(kept(1), kept(4), winograd)}
        elif row.op == "snake_upsample1d":
            stride, mode, padding = options["stride"], options["mode"], options["padding"]
            winograd = forms.upsample_products(form, mode, kept(1).shape[1]) if family != "triton" else 0
            packed = packing.pack_upsample1d(kept(1), stride, mode, padding, winograd)
            options |= {"winograd": winograd, "packed": packed}
        elif row.quantizer_tensors:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            options["packed"] = packing.pack_rvq(*(t.to(wide) for t in row.quantizer_tensors))
    if row.op == "rvq_lookup" and row.device != "cpu":  # the result takes the weight's dtype, as in the engine
        weights, options["channels_last"] = (weights[0], kept(1), weights[2]), True
    function: Callable[..., Any] = getattr(ops, row.op)

    def call() -> object:
        with torch.inference_mode(), backend(family):
            return _first(function(x, *weights, **options))

    return call


class _Depthwise(nn.Module):
    def __init__(self, block: FoldedConvNeXt) -> None:
        super().__init__()
        self.depthwise, self.norm = block.depthwise, block.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.depthwise(x).movedim(1, -1)).movedim(-1, 1)


class _Search(nn.Module):
    def __init__(self, quantizer: FoldedQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> Tensor:
        return self.quantizer.search(leave(z))[0]


class _Lookup(_Search):
    def forward(self, codes: Tensor) -> Tensor:
        return enter(self.quantizer.lookup(codes), "1d")


def _folded_op(row: Row, form: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The op on folded weights in one graph form, with its input in that form's layout."""
    layer = row.layer
    x = row.input(dtype, channels_last=form == "2d")
    if isinstance(layer, Quantizer):
        quantizer = FoldedQuantizer(layer, row.state)
        # Codes are searched in float32 in every mode, here and in ours.
        dtype = torch.float32 if row.op == "rvq_search" and dtype != torch.float64 else dtype
        module: nn.Module = _Search(quantizer) if row.op == "rvq_search" else _Lookup(quantizer)
        return finish(module, "1d", dtype, row.device), (x.to(dtype) if x.is_floating_point() else x,)
    if isinstance(layer, ConvNeXt):
        module = _Depthwise(FoldedConvNeXt(layer, row.state, form))
    else:
        module = fold_layers([layer], row.state, form)
    return finish(module, form, dtype, row.device), (x[:, :, None] if form == "2d" else x,)


def _flat(call: Call) -> Call:
    """Drops the H=1 dim of the 2d form's output, which costs nothing and lets every side be compared
    alike."""

    def flat() -> object:
        y = call()
        return y[:, :, 0] if isinstance(y, Tensor) and y.dim() == 4 else y

    return flat


def _folded(row: Row, dtype: torch.dtype, form: str) -> Call:
    return _flat(module_call(*_folded_op(row, form, dtype)))


def _compiled(row: Row, dtype: torch.dtype, form: str, freeze: bool) -> Call:
    module, inputs = _folded_op(row, form, dtype)
    return _flat(compiled_call(module, inputs, freeze=freeze))


def _faiss(row: Row, dtype: torch.dtype) -> Call:
    if row.op != "rvq_search":
        raise Unavailable("searches codebooks only")
    if row.device != "cpu":
        raise Unavailable("runs on the CPU here")
    assert isinstance(row.layer, Quantizer)
    return faiss_peer.search_call(row.layer, row.state, row.input(torch.float32, channels_last=True))


@dataclass(frozen=True)
class Provider:
    """A way to run a row without us."""

    name: str
    what: str
    build: Callable[[Row, torch.dtype], Call]
    packages: tuple[str, ...] = ()


PROVIDERS: tuple[Provider, ...] = (
    Provider("eager", "the plain reference, eager", reference_call),
    Provider("folded2d", "Conv2d with H=1, channels-last, eager", lambda row, dtype: _folded(row, dtype, "2d")),
    Provider("compile", "torch.compile of the folded layer", lambda row, dtype: _compiled(row, dtype, "1d", False)),
    Provider(
        "frozen2d",
        "Conv2d with H=1, torch.compile with freezing",
        lambda row, dtype: _compiled(row, dtype, "2d", True),
    ),
    Provider("faiss", "faiss-cpu, one flat index per stage", _faiss, ("faiss-cpu",)),
)


@torch.no_grad()
def make_check(row: Row, dtype: torch.dtype) -> WaveCheck | CodesCheck:
    """The float64 result for the input as `dtype` holds it, and what is allowed beside it."""
    with exact_math():
        if row.op == "rvq_search":
            z, weights = row.input(dtype, channels_last=False).double(), row.cast(torch.float64)[1:]
            codes, _, margins = reference_ops.rvq_search_ref(z, *weights, return_margin=True)
            assert margins is not None
            bounds = testing.rvq_margin_bound(z, *weights)
            return CodesCheck((codes.cpu(),), (margins.cpu(),), (bounds.cpu(),))
        exact = replace(row, args=(row.input(dtype, channels_last=False), *row.args[1:]))
        wanted = torch.as_tensor(reference_call(exact, torch.float64)()).cpu()
        return WaveCheck(wanted, Error.of(torch.as_tensor(reference_call(row, dtype)()), wanted))
