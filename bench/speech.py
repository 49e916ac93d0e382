"""`python -m bench inference`: `Inference.encode` with w2v-BERT at its real size and random weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualcodec_ext as dx
from dualcodec_ext import testing
from dualcodec_ext._w2v_bert import ready
from dualcodec_ext.semantic import resample

from .correctness import Verdict
from .measure import Case, Side
from .ours import require_module
from .peers.base import Call, Unavailable
from .peers.torch_peers import pypi_model
from .program import build_program

_LAYER = 17  # whose output is the features
_RATES_HZ = (24000, 16000)
_F32, _BF16 = torch.float32, torch.bfloat16


@dataclass
class Speech:
    """The semantic model, the codec and the audio of a run; each is made when it is first asked for.

    Args:
        settings: of the codec.
        seconds: of audio.
        semantic: settings of Wav2Vec2BertConfig; none are the released model's sizes.
    """

    settings: dict[str, Any]
    seconds: float
    semantic: Mapping[str, Any]

    @cached_property
    def audio(self) -> Tensor:
        return testing.make_speech(int(self.seconds * _RATES_HZ[0]))  # [1, 1, S]

    @cached_property
    def whole(self) -> nn.Module:
        """All layers, float32."""
        try:
            from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
        except ImportError:
            raise Unavailable("transformers is not installed") from None
        torch.manual_seed(0)
        return Wav2Vec2BertModel(Wav2Vec2BertConfig(**self.semantic)).eval().requires_grad_(False)

    @cached_property
    def extractor(self) -> Any:
        from transformers import SeamlessM4TFeatureExtractor

        return SeamlessM4TFeatureExtractor()

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        width = int(self.whole.config.hidden_size)
        return torch.zeros(width), torch.ones(width)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return testing.seeded_model(self.settings).state_dict()

    def codec(self) -> dx.DualCodec:
        model = dx.DualCodec(**self.settings)
        model.load_state_dict(self.state)
        return model.eval()

    def first_layers(self, dtype: torch.dtype) -> Any:
        """What `ready` makes of the model up to the layer that is wanted."""
        import copy

        model = copy.copy(self.whole)
        model._modules = dict(model._modules)
        model.config = copy.deepcopy(model.config)
        model.config.num_hidden_layers = _LAYER
        encoder = copy.copy(self.whole.encoder)
        encoder._modules = {**encoder._modules, "layers": self.whole.encoder.layers[:_LAYER]}
        encoder.config = model.config
        model._modules["encoder"] = encoder
        return ready(model, torch.device("cpu"), None if dtype == _F32 else dtype)

    def flops(self, layers: int) -> float:
        """Of the semantic model's matrix products; attention's scores come on top."""
        steps = self.seconds * 50
        counted = [self.whole.feature_projection, *self.whole.encoder.layers[:layers]]
        weights = [m.weight for part in counted for m in part.modules() if isinstance(m, nn.Linear | nn.Conv1d)]
        return 2.0 * steps * sum(w.numel() for w in weights)


def ours(speech: Speech, dtype: torch.dtype) -> Call:
    """`Inference.encode`: the first 17 layers, then the codec's kernels."""
    require_module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference = dx.Inference(speech.codec(), device="cpu", autocast=False if dtype == _F32 else dtype)
    inference.semantic._loaded = (speech.first_layers(dtype), speech.extractor, *speech.statistics)
    inference.model.prepare()
    audio = speech.audio
    return lambda: inference.encode(audio, 1 + speech.settings["n_codebooks"])


def pypi(speech: Speech) -> Call:
    """As the PyPI package goes about it, in float32: every layer, hidden_states[17], then its own eager codec."""
    codec = pypi_model(speech.settings, speech.state)
    model, extractor, (mean, std) = speech.whole, speech.extractor, speech.statistics
    factor = int(speech.settings["semantic_downsample_factor"])

    @torch.no_grad()
    def call() -> object:
        clip = resample(speech.audio[0], *_RATES_HZ)  # [1, S]
        inputs = extractor(clip, sampling_rate=_RATES_HZ[1], return_tensors="pt")
        hidden = model(**inputs, output_hidden_states=True).hidden_states[_LAYER]
        features = F.avg_pool1d(((hidden - mean) / std).transpose(1, 2), factor, factor)
        return codec.encode(speech.audio, num_quantizers=1 + speech.settings["n_codebooks"], semantic_repr=features)

    return call


class Agreement:
    """Codes beside those of the PyPI package's way in float32, or where that cannot be had, of ours in float32."""

    def __init__(self) -> None:
        self.wanted: tuple[Tensor, Tensor] | None = None

    def __call__(self, found: Any, dtype: torch.dtype, *, ours: bool, fast: bool = False) -> Verdict:
        semantic, acoustic = found
        if self.wanted is None:
            self.wanted = (semantic, acoustic)
        frames = min(semantic.shape[-1], self.wanted[0].shape[-1])
        same = [
            float((a[..., :frames] == b[..., :frames]).double().mean())
            for a, b in zip((semantic, acoustic), self.wanted, strict=True)
        ]
        # bfloat16 features are another input: their agreement is told, and nothing is asked of it.
        ok = dtype != _F32 or (same[0] >= 0.98 and same[1] >= 0.9)
        text = f"{100 * same[0]:.2f}% of semantic, {100 * same[1]:.2f}% of acoustic codes same"
        return Verdict(ok, text, {"semantic_agreement": same[0], "acoustic_agreement": same[1]})


def inference_case(
    settings: dict[str, Any], name: str, seconds: float, peers: str, semantic: Mapping[str, Any] | None = None
) -> tuple[Case, list[Side]]:
    """The case and its sides, the one to compare with first."""
    speech = Speech(settings, seconds, semantic or {})
    program = build_program(settings)
    frames = program.frames(seconds)
    try:
        semantic_flops = speech.flops(_LAYER)
        weights = sum(p.numel() for p in speech.whole.parameters())
    except Unavailable:
        semantic_flops, weights = 0.0, 0
    case = Case(
        name=f"inference {name}",
        flops=program.encode_flops(frames) + semantic_flops,
        touched_bytes=lambda kind: float((program.encode_weights() + weights) * kind.itemsize),
        audio_s=frames * program.hop_samples / program.sample_rate_hz,
        frames=frames,
        check=Agreement(),
        facts={"model": name, "batch": 1, "item_frames": frames},
    )
    sides = [
        Side("dualcodec_ext", "ours, float32", _F32, lambda: ours(speech, _F32), ours=True),
        Side("dualcodec_ext bf16", "ours, bfloat16 features", _BF16, lambda: ours(speech, _BF16), ours=True, fast=True),
    ]
    if peers != "none":
        sides.insert(0, Side("pypi", "every layer, float32, eager codec", _F32, lambda: pypi(speech)))
    return case, sides
