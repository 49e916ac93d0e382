"""Reads what w2v-BERT features need: the model up to layer 17, its feature extractor, the statistics."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._w2v_layers import PackedLayers
from .errors import DualCodecError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAYERS = 17


def autocast_dtype(device: torch.device, autocast: bool | torch.dtype) -> torch.dtype | None:
    """Return torch.autocast's dtype for what `W2vBertFeatures` calls autocast; None for float32."""
    if isinstance(autocast, torch.dtype):
        if autocast not in (torch.float16, torch.bfloat16, torch.float32):
            raise DualCodecError(f"autocast must be a bool, float16, bfloat16 or float32, got {autocast}")
        return None if autocast == torch.float32 else autocast
    if not autocast or (device.type == "cpu" and not _cpu_computes_float16()):
        return None
    return torch.float16


def _cpu_computes_float16() -> bool:
    # No public call says so. Where torch drops this one, the CPU is taken to have no float16.
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def load_w2v_bert(folder: Path) -> tuple[Any, Any]:
    """Read a Wav2Vec2BertModel that ends behind its 17th layer, and its feature extractor.

    Args:
        folder: what transformers' save_pretrained wrote of both.

    Returns:
        The model in float32 and eval mode, and a SeamlessM4TFeatureExtractor.

    Raises:
        DualCodecError: files or weights that are missing, or fewer layers than that.
    """
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise DualCodecError(f"w2v_path: {folder} must hold {name}, it does not")
    try:
        config = Wav2Vec2BertConfig.from_pretrained(folder)
        if config.num_hidden_layers < _LAYERS:
            raise DualCodecError(
                f"w2v_path: the model must have at least {_LAYERS} layers, got {config.num_hidden_layers}"
            )
        # hidden_states[17] is what the 17th layer gives; behind the last layer only these two would follow.
        config.num_hidden_layers = _LAYERS
        config.add_adapter = config.use_intermediate_ffn_before_adapter = False
        with _quiet_transformers():
            loaded: Any = Wav2Vec2BertModel.from_pretrained(folder, config=config, output_loading_info=True)
            model, report = loaded
        extractor = SeamlessM4TFeatureExtractor.from_pretrained(folder)
    except DualCodecError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError and safetensors' own
        lines = str(error).strip().splitlines()
        raise DualCodecError(
            f"w2v_path: {folder} must hold a Wav2Vec2BertModel: {lines[0] if lines else type(error).__name__}"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if key != "masked_spec_embed")  # used in training alone
    if missing:
        raise DualCodecError(f"w2v_path: {folder} lacks {missing[0]} ({len(missing)} such)")
    # transformers 5 keeps the checkpoint's dtype.
    return model.to(torch.float32).eval().requires_grad_(False), extractor


def keep_weights_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn the weights of linear layers and convolutions into `dtype`, in place.

    Under torch.autocast that changes no result: it would turn them into `dtype` on every call, since it keeps only
    those that need gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            module.to(dtype)


def ready(model: Any, device: torch.device, half: torch.dtype | None) -> Any:
    """Return what runs a loaded model: its layers packed where they are known, else the model itself.

    Args:
        model: as `load_w2v_bert` gives it; it must not be used on.
        device: where it is to run.
        half: of `autocast_dtype`.
    """
    dtype = torch.float32 if half is None else half
    if device.type == "cpu" and dtype != torch.float16 and PackedLayers.takes(model.config):
        return PackedLayers(model, dtype)
    if half is not None:
        keep_weights_in(model, half)
    return model.to(device)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from listing the layers left out on purpose; the caller checks for missing ones."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def load_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read the statistics of the features.

    Args:
        path: a torch file of a dict with the tensors `mean` and `var`.
        channels: how many numbers each must have.

    Returns:
        Mean and standard deviation, [channels] float32 each.

    Raises:
        DualCodecError: another file, or another size.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        mean, var = saved["mean"], saved["var"]
        mean, std = mean.to(torch.float32).reshape(-1), var.to(torch.float32).sqrt().reshape(-1)
    except Exception as error:  # pickle, zip and key errors: any of them means that this is another file
        raise DualCodecError(
            f"statistics: {path} must be a torch file with the tensors mean and var, it is not"
        ) from error
    if mean.numel() != channels or std.numel() != channels:
        raise DualCodecError(
            f"statistics: {path} must hold {channels} numbers, one per channel of the semantic model, "
            f"got {mean.numel()}"
        )
    return mean, std
