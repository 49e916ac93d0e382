"""torch.ops.dualcodec_ext_triton: the Triton family, with the schemas that the compiled module gives its own ops.

Nothing here imports triton; an op's first call imports its kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "dualcodec_ext_triton"

SCHEMAS = {
    "causal_dwconv1d": "(Tensor x, Tensor weight, Tensor? bias, int[] padding, Tensor? ln_weight, Tensor? ln_bias, "
    "float eps, Tensor? lengths) -> Tensor",
    "pack_rvq": "(Tensor in_weight, Tensor in_bias, Tensor codebooks, Tensor out_weight, Tensor out_bias) -> Tensor",
    "pack_upsample1d": "(Tensor weight, int stride, str mode, int[] padding, int winograd=0) -> Tensor",
    "rvq_lookup": "(Tensor codes, Tensor codebooks, Tensor out_weight, Tensor out_bias, Tensor? addend, "
    "Tensor? lengths, bool channels_last, Tensor? packed) -> Tensor",
    "rvq_search": "(Tensor z, Tensor in_weight, Tensor in_bias, Tensor codebooks, Tensor out_weight, "
    "Tensor out_bias, int num_quantizers, bool return_quantized, bool return_margin, Tensor? lengths, "
    "Tensor? packed) -> (Tensor codes, Tensor quantized, Tensor margin)",
    "snake_upsample1d": "(Tensor x, Tensor? alpha, Tensor weight, Tensor? bias, int stride, str mode, int[] padding, "
    "Tensor? lengths, Tensor? packed, int winograd=0) -> Tensor",
}

# Where an op is implemented, when not in the module of its own name.
_MODULES = {"pack_rvq": "rvq", "pack_upsample1d": "snake_upsample1d"}

_library = torch.library.Library(NAMESPACE, "DEF")


def _lazy(name: str) -> Callable[..., Any]:
    module = f"{__package__}.triton.{_MODULES.get(name, name)}"

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    # Plain tensors on the CPU are for Triton's interpreter; the launcher refuses them without it.
    _library.impl(_name, _lazy(_name), "CUDA")
    _library.impl(_name, _lazy(_name), "CPU")
