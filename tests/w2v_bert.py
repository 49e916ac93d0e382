"""A small w2v-BERT with random weights on disk, and the features as the PyPI package computes them from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualcodec_ext.semantic import resample

STATISTICS_FILE = "w2vbert2_mean_var_stats_emilia.pt"


def save_w2v_bert(folder: Path, hidden: int = 32, layers: int = 19, half: bool = False, **settings: Any) -> Path:
    """Write a Wav2Vec2BertModel with its feature extractor, and the statistics beside them; returns the folder.

    Args:
        folder: made if it is missing.
        hidden: width of the model.
        layers: of the encoder.
        half: write the weights in float16.
        **settings: more of Wav2Vec2BertConfig.
    """
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        conv_depthwise_kernel_size=5,
        position_embeddings_type="relative_key",
        **settings,
    )
    model = Wav2Vec2BertModel(config)
    (model.half() if half else model).save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    statistics = {"mean": torch.linspace(-0.5, 0.5, hidden), "var": torch.linspace(0.5, 2, hidden)}
    torch.save(statistics, folder / STATISTICS_FILE)
    return folder


@torch.no_grad()
def upstream_features(
    folder: Path, audio: Tensor, factor: int, half: torch.dtype | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return [B, C, F] as the PyPI package gives it: the whole model, hidden_states[17], then the statistics.

    Args:
        folder: of `save_w2v_bert`.
        audio: [B, 1, S].
        factor: how many frames are averaged into one.
        half: torch.autocast's dtype; None: without.
        dtype: of the model's weights and input.
    """
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

    model = Wav2Vec2BertModel.from_pretrained(folder).to(dtype).eval()
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(folder)
    at_16k = [resample(clip, 24000, 16000) for clip in audio]  # a batch may round differently
    inputs = [extractor(clip, sampling_rate=16000, return_tensors="pt") for clip in at_16k]
    with torch.autocast("cpu", dtype=half, enabled=half is not None):
        hidden = model(
            input_features=torch.cat([item["input_features"] for item in inputs]).to(dtype),
            attention_mask=torch.cat([item["attention_mask"] for item in inputs]),
            output_hidden_states=True,
        ).hidden_states[17]
        statistics = torch.load(folder / STATISTICS_FILE, weights_only=True)
        feat = (hidden - statistics["mean"]) / statistics["var"].sqrt()
        return torch.nn.functional.avg_pool1d(feat.transpose(1, 2).to(dtype), factor, factor)
