"""Every peer of decode and encode, by name. The peers of single ops are beside the ops, in
bench/registry.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import graph_peers, torch_peers
from .base import Call, Peer
from .torch_peers import of_dtype

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_TAGS = {_F32: "", _BF16: "-bf16", _F16: "-fp16"}
_EXPORT = ("onnx", "onnxscript")
_H1 = "Conv2d with H=1"


def _peers(dtype: torch.dtype) -> Iterator[Peer]:
    """The peers of one dtype; zentorch comes last, since importing it hooks into torch."""

    def peer(name: str, what: str, build: Callable[..., Call], *args: Any, packages: tuple[str, ...] = ()) -> Peer:
        tag = _TAGS[dtype]
        return Peer(name + tag, dtype, what + tag.replace("-", ", "), of_dtype(build, *args), packages)

    if dtype == _F32:
        packages = ("dualcodec", "easydict", "einops")
        yield peer("pypi", "the PyPI package as it stands", torch_peers.pypi, packages=packages)
    if dtype == _F16:
        packages = ("dualcodec", "easydict", "einops")
        yield peer("pypi", "the PyPI package under autocast", torch_peers.pypi_autocast, packages=packages)
    yield peer("reference", "the plain reference, eager", torch_peers.reference, dtype)
    for form, label in (("1d", ""), ("2d", f", {_H1}")):
        name = "folded" if form == "1d" else "folded2d"
        yield peer(name, f"folded weights, eager{label}", torch_peers.folded, form, dtype)
    recorded = "folded weights, eager, replayed from a CUDA graph"
    yield peer("recorded", recorded, torch_peers.recorded, "1d", dtype)
    yield peer("compile", "folded weights, torch.compile", torch_peers.compiled, "1d", dtype, False)
    tuned = "folded weights, torch.compile max-autotune with CUDA graphs"
    yield peer("autotune", tuned, torch_peers.autotuned, "1d", dtype)
    yield peer("frozen2d", f"{_H1}, torch.compile with freezing", torch_peers.compiled, "2d", dtype, True)
    for form, label in (("1d", "Conv1d"), ("2d", _H1)):
        if dtype == _F32:  # ONNX Runtime has no half-precision convolution on the CPU
            packages = ("onnxruntime", *_EXPORT)
            yield peer(f"ort{form}", f"ONNX Runtime, {label}", graph_peers.onnxruntime, form, packages=packages)
    for form, label in (("1d", "Conv1d"), ("2d", _H1)):
        if dtype != _F16:
            packages = ("openvino", *_EXPORT)
            yield peer(f"openvino{form}", f"OpenVINO, {label}", graph_peers.openvino, form, dtype, packages=packages)
    if dtype != _F16:
        what = f"{_H1}, zentorch with freezing"
        yield peer("zentorch2d", what, torch_peers.zentorch, "2d", dtype, packages=("zentorch",))


CODEC_PEERS: tuple[Peer, ...] = (*_peers(_F32), *_peers(_BF16), *_peers(_F16))


def select(wanted: str, dtype: torch.dtype, known: tuple[Peer, ...] = CODEC_PEERS, device: str = "cpu") -> list[Peer]:
    """Choose peers.

    Args:
        wanted: "none", "all" (those of the run's dtype, and the PyPI package and folded-bf16 in any run; on a GPU
            also the PyPI package under autocast, and none that runs on the CPU alone) or names separated by commas.
        dtype: of the run.
        known: what can be named.
        device: of the run.

    Raises:
        ValueError: an unknown name, with those that are known.
    """
    if wanted == "none":
        return []
    if wanted == "all":
        always = ("pypi", "folded-bf16") if device == "cpu" else ("pypi", "pypi-fp16", "folded-bf16")
        elsewhere = ("autotune", "recorded") if device == "cpu" else ("ort", "openvino", "zentorch", "frozen")
        chosen = [peer for peer in known if peer.dtype == dtype or peer.name in always]
        return [peer for peer in chosen if not peer.name.startswith(elsewhere)]
    by_name = {peer.name: peer for peer in known}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in by_name:
            raise ValueError(f"--peers must name some of {', '.join(by_name)}, or be all or none, got {name}")
    return [by_name[name] for name in names]
