"""accelerate: the drop-in around a model that exists already, on the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import reference
from .errors import DualCodecError
from .model import DualCodec


def accelerate(
    model: nn.Module, dtype: torch.dtype | None = None, fast: bool = False, release: bool = False
) -> DualCodec:
    """Return a `DualCodec` that runs compiled kernels on the parameters of `model`.

    The parameters are shared, not copied: training or loading into either object is seen by both
    (`load_state_dict(assign=True)` ends that, as it gives the one it is called on parameters of its own).

    Args:
        model: `dualcodec.DualCodec`, `dualcodec_ext.reference.DualCodec` or `dualcodec_ext.DualCodec`.
        dtype: of activations and audio, whatever the parameters have (None: that of the parameters).
        fast: whether decode takes the faster, less exact path: `DualCodec.set_fast`.
        release: pack the weights now and free the parameters of both objects. What is left encodes and decodes and
            nothing else; it can't be trained, saved, copied or moved.

    Returns:
        The model, in train or eval mode as `model` is; `release` needs eval mode.

    Raises:
        DualCodecError: `model` is no DualCodec, or is a variant that this package does not know; or `fast` with
            anything but float32 on the CPU.

    Source: the PyPI package `dualcodec` 0.4.2 stores no configuration, so it is read off the modules.
    """
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise DualCodecError(f"accelerate: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    if isinstance(model, DualCodec):
        model._check_parameters()
    settings = dict(model.settings) if isinstance(model, reference.DualCodec) else _read_settings(model)
    try:
        with torch.device("meta"):
            fast_model = DualCodec(**settings)
    except ValueError as error:
        raise DualCodecError(f"accelerate: model has settings that can't be run: {error}") from None
    if isinstance(model, DualCodec):
        fast_model._front_end = model._front_end
    _share_parameters(model, fast_model)
    fast_model.train(model.training)
    fast_model._compute_dtype = dtype
    fast_model.set_fast(fast)
    if release:
        fast_model.release()
        _forget_weights(model)
    return fast_model


def _forget_weights(model: nn.Module) -> None:
    """Free what a model keeps besides its parameters, once those are freed."""
    if isinstance(model, DualCodec):
        model._engine_state, model._freed = None, True
    for module in model.modules():
        # torch.nn.utils.weight_norm leaves the last product of g and v on the module, as large as v.
        if "weight_v" in module._parameters and isinstance(getattr(module, "weight", None), torch.Tensor):
            setattr(module, "weight", None)  # noqa: B010, to mypy it is a Tensor or a Module


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    theirs, ours = dict(source.named_parameters()), dict(target.named_parameters())
    for name in [*theirs, *ours]:
        if name not in theirs or name not in ours:
            where = "model lacks" if name not in theirs else "model has the unknown"
            raise DualCodecError(f"accelerate: model must have the parameters of a DualCodec: {where} {name}")
        if theirs[name].shape != ours[name].shape:
            raise DualCodecError(f"accelerate: {name} must be {list(ours[name].shape)}, got {list(theirs[name].shape)}")
    for name, parameter in theirs.items():
        owner, _, leaf = name.rpartition(".")
        target.get_submodule(owner)._parameters[leaf] = parameter


def _read_settings(model: Any) -> dict[str, Any]:
    try:
        dac, vq = model.dac, model.semantic_vq
        project, *blocks = list(model.convnext_encoder)
        settings = {
            "encoder_dim": dac.encoder_dim,
            "encoder_rates": list(dac.encoder_rates),
            "latent_dim": dac.latent_dim,
            "decoder_dim": dac.decoder_dim,
            "decoder_rates": list(dac.decoder_rates),
            "n_codebooks": dac.n_codebooks,
            "codebook_size": dac.codebook_size,
            "codebook_dim": dac.codebook_dim if isinstance(dac.codebook_dim, int) else list(dac.codebook_dim),
            "quantizer_dropout": dac.quantizer.quantizer_dropout,
            "sample_rate": dac.sample_rate,
            "distill": dac.distill,
            "semantic_codebook_size": vq.codebook_size,
            "semantic_codebook_dim": vq.quantizers[0].codebook_dim,
            "semantic_dim": project.in_channels,
            "convnext_dim": project.out_channels,
            "convnext_layers": len(blocks),
            "decode_semantic_for_codec": model.decode_semantic_for_codec,
            "semantic_downsample_factor": model.semantic_downsample_factor,
        }
        if blocks:
            settings["is_causal"] = blocks[0].is_causal
            settings["convnext_intermediate_dim"] = blocks[0].pwconv1.out_features
        if dac.distill:
            settings["distill_projection_out_dim"] = dac.distill_projection.out_channels
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DualCodecError(
            f"accelerate: model must be a DualCodec (dualcodec's or dualcodec_ext's), "
            f"got {type(model).__name__}: {error}"
        ) from None
    for block in blocks:
        if getattr(block, "gamma", None) is not None or getattr(block, "adanorm", False):
            raise DualCodecError(
                "accelerate: model must have plain ConvNeXt blocks, got one with gamma or AdaLayerNorm"
            )
    return settings
