"""get_model and Inference: the PyPI package's entry points, with its signatures and defaults."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import reference
from .config import DualCodecConfig
from .errors import DualCodecError
from .hub import BUNDLED, DEFAULT_SOURCE
from .model import DualCodec
from .reference.checks import check_waves
from .semantic import W2vBertFeatures
from .windows import OVERLAP_S

Codes = tuple[Tensor, Tensor | None]


def get_model(
    model_id: str = "12hz_v1", pretrained_model_path: str | Path | None = "hf://amphion/dualcodec"
) -> DualCodec:
    """Build a released model and load its checkpoint.

    Args:
        model_id: "12hz_v1" or "25hz_v1", or another preset.
        pretrained_model_path: directory that holds the checkpoint under its released name, the file itself,
            or a hub name; None gives random weights and a warning. "tiny" is in the package and needs none.

    Returns:
        The model on the CPU in float32, in eval mode.

    Raises:
        DualCodecError: no such model or file.
        MissingExtraError: a hub name without huggingface_hub installed.

    Source: the PyPI package `dualcodec` 0.4.2.
    """
    if model_id not in DualCodecConfig.presets():
        raise DualCodecError(
            f"get_model: model_id must be one of {', '.join(DualCodecConfig.presets())}, got {model_id!r}"
        )
    if pretrained_model_path is None:
        warnings.warn("pretrained_model_path is not given, model will be loaded without weights", stacklevel=2)
        return DualCodec(**DualCodecConfig.preset(model_id).to_dict()).eval()
    bundled = model_id in BUNDLED and str(pretrained_model_path) == DEFAULT_SOURCE
    return DualCodec.from_pretrained(model_id, weights=None if bundled else pretrained_model_path)


class Inference:
    """Speech to codes and back, semantic features included.

    The semantic model is looked for and loaded at the first `encode`, so decoding needs neither path. A codec that
    computes its semantic features itself, such as tiny, never needs them, and gives what its own `encode` gives.

    Args:
        dualcodec_model: the codec; it is moved to `device` and put into eval mode.
        dualcodec_path: directory (or hub name) that holds the feature statistics.
        w2v_path: directory (or hub name) of w2v-BERT 2.0.
        device: where both models run; "cuda" without CUDA gives a warning and the CPU.
        autocast: how the semantic model computes: False for float32; True for float16 through torch.autocast
            where the device has it (a CPU without it runs float32, which is faster there and more accurate);
            or a dtype, such as torch.bfloat16, which is the fast one on most CPUs. The codec computes in its
            own dtype.
        window_s, overlap_s: compute the features of clips past one minute in windows, an approximation: see
            `W2vBertFeatures`. None: whole clips, as upstream.
        **kwargs: `meanvar_fname`, the name of the statistics file; others are ignored with a warning.

    Numerics: upstream's `autocast` covers the codec as well, so that it searches its codebooks in half
        precision, and its semantic model runs in float16 even with autocast=False. Here the search is always
        float32, and False means float32 throughout.
    Source: the PyPI package `dualcodec` 0.4.2.
    """

    def __init__(
        self,
        dualcodec_model: nn.Module,
        dualcodec_path: str | Path = "hf://amphion/dualcodec",
        w2v_path: str | Path = "hf://facebook/w2v-bert-2.0",
        device: str | torch.device = "cuda",
        autocast: bool | torch.dtype = True,
        window_s: float | None = None,
        overlap_s: float = OVERLAP_S,
        **kwargs: Any,
    ) -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            warnings.warn("CUDA is not available, running on CPU.", stacklevel=2)
            device = "cpu"
        statistics = {name: kwargs.pop(name) for name in ("meanvar_fname",) if name in kwargs}
        if kwargs:
            warnings.warn(f"Inference: ignored unknown arguments {', '.join(sorted(kwargs))}", stacklevel=2)
        self.device = device
        self.autocast = autocast
        codec: Any = dualcodec_model.to(device).eval()
        self.model = codec
        self.semantic = W2vBertFeatures(
            w2v_path,
            dualcodec_path,
            downsample_factor=codec.semantic_downsample_factor,
            device=device,
            autocast=autocast,
            window_s=window_s,
            overlap_s=overlap_s,
            **statistics,
        )

    @overload
    def encode(self, audio: Tensor, n_quantizers: int = 8) -> Codes: ...

    @overload
    def encode(self, audio: Sequence[Tensor], n_quantizers: int = 8) -> list[Codes]: ...

    @torch.no_grad()
    def encode(self, audio: Tensor | Sequence[Tensor], n_quantizers: int = 8) -> Codes | list[Codes]:
        """Turn speech into codes.

        Args:
            audio: [B, 1, S] float at 24 kHz, in [-1, 1], on any device; or clips of any lengths, each [S], [1, S] or
                [1, 1, S].
            n_quantizers: codebooks to use, the semantic one included, at least 1.

        Returns:
            Semantic codes [B, 1, F] int64, and acoustic codes [B, n_quantizers - 1, F] int64, None for
            n_quantizers=1; F may be one less than the audio fills. Of a sequence of clips, a list of such pairs with
            B = 1: what each clip gives in a call of its own. Its features are computed clip by clip, its codes in one
            batch.

        Raises:
            ValueError: wrong audio, or files of the semantic model that are missing.
            MissingExtraError: of a codec without features of its own: transformers is not installed, or
                huggingface_hub for a hub name.
        """
        if isinstance(audio, Tensor):
            return self._encode(audio, self._features(audio), n_quantizers)
        clips = [_one_clip(i, clip) for i, clip in enumerate(audio)]
        features = [self._features(clip) for clip in clips]
        if len(clips) < 2 or not isinstance(self.model, reference.DualCodec):
            return [self._encode(*pair, n_quantizers) for pair in zip(clips, features, strict=True)]
        samples, frames = (torch.tensor([x.shape[-1] for x in items]) for items in (clips, features))
        device = self.device
        lengths = {"lengths": samples.to(device), "feature_lengths": frames.to(device)}
        semantic, acoustic = self._encode(_padded(clips), _padded(features), n_quantizers, **lengths)
        pairs = []
        for i, n in enumerate(frames.tolist()):
            pairs.append((semantic[i : i + 1, :, :n], None if acoustic is None else acoustic[i : i + 1, :, :n]))
        return pairs

    def _features(self, audio: Tensor) -> Tensor:
        check_waves("Inference.encode", "audio", audio)
        if not getattr(self.model, "has_front_end", False):
            return self.semantic(audio)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            features: Tensor = self.model.semantic_features(audio.to(self.device))
        return features

    def _encode(self, audio: Tensor, features: Tensor, n_quantizers: int, **lengths: Tensor) -> Codes:
        dtype = getattr(self.model, "compute_dtype", None) or next(self.model.parameters()).dtype
        with torch.autocast(torch.device(self.device).type, enabled=False):
            semantic, acoustic = self.model.encode(
                audio.to(self.device, dtype), num_quantizers=n_quantizers, semantic_repr=features.to(dtype), **lengths
            )
        return semantic, acoustic

    @torch.no_grad()
    def decode_from_codes(self, semantic_codes: Tensor, acoustic_codes: Tensor | None) -> Tensor:
        """Turn codes into speech.

        Args:
            semantic_codes: [B, 1, F] integers.
            acoustic_codes: [B, q, F] integers, the first q acoustic codebooks; None decodes the semantic
                codes alone.

        Returns:
            Audio [B, 1, S'] float32 at 24 kHz.

        Raises:
            ValueError: a wrong shape, or a code out of range.
        """
        acoustic = None if acoustic_codes is None else acoustic_codes.to(self.device)
        audio: Tensor = self.model.decode_from_codes(semantic_codes.to(self.device), acoustic)
        return audio.to(torch.float32)

    @torch.no_grad()
    def decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None) -> Tensor:
        """The same as `decode_from_codes`."""
        return self.decode_from_codes(semantic_codes, acoustic_codes)


def _one_clip(i: int, clip: Any) -> Tensor:
    """Return a clip of a sequence as [1, 1, S]."""
    if not isinstance(clip, Tensor) or not 1 <= clip.dim() <= 3 or clip.shape[:-1].numel() != 1:
        got = list(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
        raise DualCodecError(f"Inference.encode: clip {i} must be [S], [1, S] or [1, 1, S], got {got}")
    return clip.reshape(1, 1, -1)


def _padded(items: Sequence[Tensor]) -> Tensor:
    """Put items [1, C, T_i] into one batch, zeros behind each."""
    longest = max(item.shape[-1] for item in items)
    return torch.cat([nn.functional.pad(item, (0, longest - item.shape[-1])) for item in items])
