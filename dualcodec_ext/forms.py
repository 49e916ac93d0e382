"""Which form a decoder's layers take: the direct one, or one with fewer products, by what wins and what holds."""

from __future__ import annotations

from typing import Literal

import torch

# As direct convolutions; with as few products as keep the exact decoder's rule of error; with the fewest. Forms other
# than the direct one compute whole groups of steps.
Form = Literal["direct", "exact", "fast"]

# Of residual units: the products of a group, and the outputs that they give.
_UNIT_OUTPUTS = {0: 1, 10: 4, 13: 4, 22: 12}
_UPSAMPLE_PRODUCTS = {"transposed": 4, "repeat": 2}
# With fewer channels rows are padded and Winograd is no faster, or a decoder's largest error comes close to the rule's
# twice plain PyTorch's: up to 1.85 times for units of 16, and 2.03 where PyTorch runs in one thread; the same of 1024.
_CHANNELS: dict[Form, range] = {"direct": range(0), "exact": range(32, 1024), "fast": range(16, 1 << 31)}


def form_for(form: Form, dtype: torch.dtype, device: torch.device) -> Form:
    """Return the form that activations of a dtype take: only float32 on the CPU has another than the direct one."""
    return form if dtype == torch.float32 and device.type == "cpu" else "direct"


def unit_products(form: Form, channels: int) -> int:
    """Return the `winograd` of a residual unit; kernels/residual_unit/README.md has speed and error per layer."""
    if channels not in _CHANNELS[form]:
        return 0
    if form == "exact":
        return 13
    return 22 if channels < 512 else 10  # wide layers have few steps, and those of 22 products come in groups of 12 d


def unit_outputs(winograd: int) -> int:
    """Return how many outputs of one phase of a residual unit are computed as one group."""
    return _UNIT_OUTPUTS[winograd]


def upsample_products(form: Form, mode: str, channels: int) -> int:
    """Return the `winograd` of an upsampling to so many channels; kernels/snake_upsample1d/README.md as above."""
    return _UPSAMPLE_PRODUCTS[mode] if channels in _CHANNELS[form] else 0
