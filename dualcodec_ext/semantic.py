"""Waveform to semantic features: w2v-BERT 2.0 for the released models, log-mel for the small one."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._w2v_bert import autocast_dtype, load_statistics, load_w2v_bert, ready
from ._w2v_fbank import fbank
from ._w2v_fbank import takes as takes_extractor
from ._w2v_layers import PackedLayers
from .errors import DualCodecError, need_extra
from .hub import find_directory, find_file
from .windows import OVERLAP_S, WHOLE_S, FeatureWindows

CODEC_RATE_HZ = 24000
_W2V_RATE_HZ = 16000
# Two 25 ms windows 10 ms apart: with one the per-utterance variance is that of a single number.
_W2V_FEWEST_SAMPLES = 560


def resample(audio: Tensor, orig_hz: int, new_hz: int) -> Tensor:
    """Resample by a Hann-windowed sinc: six zero crossings a side, cut off at 0.99 of the lower Nyquist rate.

    Args:
        audio: [..., S] float.
        orig_hz: its rate, a whole number of Hz, at least 1.
        new_hz: the rate wanted, likewise.

    Returns:
        [..., ceil(S * new_hz / orig_hz)], in audio's dtype; `audio` itself when the rates are equal.

    Raises:
        DualCodecError: a wrong rate, or audio that is not floating point.

    Numerics: the filter is evaluated in float64; sums run in float32 (float64 for float64 audio), whatever
        autocast says.
    Source: the definition is that of `torchaudio.functional.resample` with its default arguments.
    """
    for name, rate in (("orig_hz", orig_hz), ("new_hz", new_hz)):
        if isinstance(rate, bool) or rate != int(rate) or rate < 1:
            raise DualCodecError(f"resample: {name} must be a whole number of Hz, got {rate}")
    if not isinstance(audio, Tensor) or not audio.is_floating_point() or audio.dim() == 0:
        got = f"{list(audio.shape)} {audio.dtype}" if isinstance(audio, Tensor) else type(audio).__name__
        raise DualCodecError(f"resample: audio must be [..., S] float, got {got}")
    common = math.gcd(int(orig_hz), int(new_hz))
    down, up = int(orig_hz) // common, int(new_hz) // common
    samples = -(-audio.shape[-1] * up // down)
    if down == up:
        return audio
    if audio.numel() == 0:
        return audio.new_zeros(*audio.shape[:-1], samples)
    dtype = torch.float64 if audio.dtype == torch.float64 else torch.float32
    filters, reach = _sinc_filters(down, up)
    x = F.pad(audio.reshape(-1, 1, audio.shape[-1]).to(dtype), (reach, reach + down))
    with torch.autocast(audio.device.type, enabled=False):
        y = F.conv1d(x, filters.to(audio.device, dtype)[:, None], stride=down)  # [N, up, blocks]
    y = y.transpose(1, 2).reshape(*audio.shape[:-1], -1)[..., :samples]
    return y.to(audio.dtype)


def resample_24k_to_16k(audio: Tensor) -> Tensor:
    """Resample [..., S] from the codec's 24 kHz to w2v-BERT's 16 kHz; as `resample`."""
    return resample(audio, CODEC_RATE_HZ, _W2V_RATE_HZ)


@lru_cache(maxsize=16)
def _sinc_filters(down: int, up: int) -> tuple[Tensor, int]:
    """One filter per output phase, [up, 2 * reach + down] float64, and `reach`.

    Output up*b + p lies at input sample down*b + down*p/up; tap k of block b is input sample
    down*b + k - reach.
    """
    zero_crossings = 6
    cutoff = min(down, up) * 0.99  # in units of 1 / (down * up) of the common rate, twice the cut-off frequency
    reach = math.ceil(zero_crossings * down / cutoff)
    taps = torch.arange(-reach, reach + down, dtype=torch.float64) / down
    phases = torch.arange(up, dtype=torch.float64) / up
    t = ((taps - phases[:, None]) * cutoff).clamp(-zero_crossings, zero_crossings)
    window = torch.cos(t * (math.pi / (2 * zero_crossings))) ** 2
    return torch.sinc(t) * window * (cutoff / down), reach


class LogMelFeatures(nn.Module):
    """Log-mel features for the small model: 80 bands at 100 Hz, stacked by two to 160 at 50 Hz, pooled.

    Frame f depends on no sample past (f + 1) * hop, and on none of the utterance's statistics, so features
    can be computed as the audio arrives. hop is 480 * downsample_factor samples. The state_dict holds `mean`
    and `variance`, [160] each.

    Args:
        downsample_factor: how many 50 Hz frames are averaged into one, at least 1: the model's
            `semantic_downsample_factor`.

    Numerics: float32. On the CPU the same samples give the same bits in any batch, and with anything or
        nothing behind them.
    """

    channels = 160
    _WINDOW, _HOP, _STACK, _FFT = 600, 240, 2, 1024
    _STRETCH = 1000  # windows that are worked on at a time, of all items together
    # The power of white noise near -80 dBFS: what lies lower is the recording's silence, not speech.
    _FLOOR = 1e-5

    mean: Tensor
    variance: Tensor
    _window: Tensor
    _bins: Tensor
    _weights: Tensor

    def __init__(self, downsample_factor: int = 1) -> None:
        super().__init__()
        if isinstance(downsample_factor, bool) or not isinstance(downsample_factor, int) or downsample_factor < 1:
            raise DualCodecError(
                f"LogMelFeatures: downsample_factor must be a whole number from 1, got {downsample_factor}"
            )
        self.downsample_factor = downsample_factor
        bins, weights = _mel_bands(80, self._FFT, CODEC_RATE_HZ, low_hz=20.0, high_hz=12000.0)
        # Rounded from generated vowels at -26 dBFS (mean -3.3, variance 11), and wider, as speech has pauses.
        self.register_buffer("mean", torch.full((self.channels,), -3.0))
        self.register_buffer("variance", torch.full((self.channels,), 16.0))
        self.register_buffer("_window", torch.hann_window(self._WINDOW), persistent=False)
        self.register_buffer("_bins", bins, persistent=False)
        self.register_buffer("_weights", weights, persistent=False)

    @property
    def hop_samples(self) -> int:
        """Samples per output frame."""
        return self._HOP * self._STACK * self.downsample_factor

    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Set what `forward` subtracts and divides by the root of.

        Args:
            mean: [160] float.
            variance: [160] float, positive.

        Raises:
            DualCodecError: a wrong shape, or a variance that is not positive.
        """
        for name, values in (("mean", mean), ("variance", variance)):
            if tuple(values.shape) != (self.channels,):
                raise DualCodecError(
                    f"LogMelFeatures.set_statistics: {name} must be [{self.channels}], got {list(values.shape)}"
                )
        if not bool((variance > 0).all()):
            raise DualCodecError(
                f"LogMelFeatures.set_statistics: variance must be positive, got {float(variance.min())}"
            )
        self.mean.copy_(mean)
        self.variance.copy_(variance)

    def forward(self, audio: Tensor) -> Tensor:
        """Compute the features.

        Args:
            audio: [B, 1, S] float at 24 kHz, in [-1, 1]; padded with zeros to whole frames.

        Returns:
            [B, 160, F] float32, F = ceil(S / hop).

        Raises:
            DualCodecError: a wrong shape or dtype.
        """
        _check_audio("LogMelFeatures", audio)
        batch, samples = audio.shape[0], audio.shape[-1]
        frames = -(-samples // self.hop_samples)
        if batch * frames == 0:
            return self.mean.new_zeros(batch, self.channels, frames)
        # A stretch at a time: windows overlap, so a whole recording's would take many times its own memory.
        count = max(1, self._STRETCH // (batch * self._STACK * self.downsample_factor))
        pieces = [self._of_frames(audio[:, 0], f, min(f + count, frames)) for f in range(0, frames, count)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def _of_frames(self, audio: Tensor, first: int, last: int) -> Tensor:
        """Features [B, 160, last - first] of audio [B, S]'s frames from first to last."""
        # All of a window's overhang is on the left: the last one ends where its frame ends.
        begin, end = first * self.hop_samples - (self._WINDOW - self._HOP), last * self.hop_samples
        x = audio[:, max(begin, 0) : end].to(torch.float32)
        x = F.pad(x, (max(-begin, 0), max(end - audio.shape[1], 0)))
        windows = x.unfold(-1, self._WINDOW, self._HOP) * self._window  # [B, 100 Hz frames, 600]
        spectrum = torch.fft.rfft(windows, n=self._FFT)
        power = spectrum.real.square() + spectrum.imag.square()
        power = power.movedim(-1, 0).contiguous()  # whole rows are picked many times faster than single numbers
        # A sum in a written-out order: that of a matmul may follow the number of rows.
        mel = power[self._bins[0]] * self._weights[0][:, None, None]
        for bins, weights in zip(self._bins[1:], self._weights[1:], strict=True):
            mel += power[bins] * weights[:, None, None]
        stacked = (mel.movedim(0, -1) + self._FLOOR).log().reshape(len(audio), -1, self.channels)
        stacked = (stacked - self.mean) / self.variance.sqrt()
        return F.avg_pool1d(stacked.transpose(1, 2).contiguous(), self.downsample_factor, self.downsample_factor)


def _mel_bands(bands: int, fft: int, rate_hz: int, low_hz: float, high_hz: float) -> tuple[Tensor, Tensor]:
    """Triangles of height one between band edges equally spaced in mel: bins and weights, both [W, bands].

    mel(f) = 1127 ln(1 + f / 700). W is the widest triangle's number of bins; the others' taps end in zeros.
    """
    mel = [1127 * math.log1p(hz / 700) for hz in (low_hz, high_hz)]
    edges_hz = 700 * torch.expm1(torch.linspace(mel[0], mel[1], bands + 2, dtype=torch.float64) / 1127)
    bin_hz = torch.arange(fft // 2 + 1, dtype=torch.float64)[:, None] * (rate_hz / fft)
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    triangles = torch.minimum((bin_hz - low) / (centre - low), (high - bin_hz) / (high - centre)).clamp(min=0)
    inside = triangles > 0
    first = inside.to(torch.int64).argmax(dim=0)
    widest = int(inside.sum(dim=0).max())
    bins = (first + torch.arange(widest)[:, None]).clamp(max=fft // 2)
    weights = triangles.gather(0, bins) * (torch.arange(widest)[:, None] < inside.sum(dim=0))
    return bins, weights.to(torch.float32)


class W2vBertFeatures:
    """The features that the released models code: w2v-BERT 2.0 after 17 layers, normalised, time-averaged.

    Nothing is looked up or loaded before the first call. Layers past the 17th are neither loaded nor run.

    Args:
        w2v_path: directory of a transformers Wav2Vec2BertModel with its feature extractor, or a hub name.
        dualcodec_path: directory that holds the statistics, or a hub name.
        downsample_factor: how many 50 Hz frames are averaged into one: the model's
            `semantic_downsample_factor`.
        device: where the model runs.
        autocast: False for float32. A dtype runs matrix products in it: bfloat16 on a CPU with the weights kept
            in it and everything else in float32, else through torch.autocast. True is float16, as upstream
            does, where the device computes in it; on a CPU without float16 arithmetic, float32.
        meanvar_fname: name of the statistics file, a dict of `mean` and `var`, [C] each.
        window_s: clips past one minute are computed in windows of so many seconds, one after the other, clip by clip:
            an approximation, in memory that does not grow with them (30 is a good choice). None: whole, as upstream
            does; attention's time grows with the square of the length, and on a GPU its memory.
        overlap_s: of two windows.

    Numerics: normalising and averaging in float32. A CPU without float16 arithmetic emulates it: of 5 s of
        audio, 4 layers of the full width with random weights took 16.6 s under float16, 1.4 s in float32 and
        0.64 s under bfloat16, and the largest errors were 0.008, 0 and 0.07 of a standard deviation (2
        threads of an AVX-512 machine, torch 2.13).
    Source: the PyPI package `dualcodec` 0.4.2, which takes hidden_states[17].
    """

    def __init__(
        self,
        w2v_path: str | Path = "hf://facebook/w2v-bert-2.0",
        dualcodec_path: str | Path = "hf://amphion/dualcodec",
        *,
        downsample_factor: int = 4,
        device: str | torch.device = "cpu",
        autocast: bool | torch.dtype = True,
        meanvar_fname: str = "w2vbert2_mean_var_stats_emilia.pt",
        window_s: float | None = None,
        overlap_s: float = OVERLAP_S,
    ) -> None:
        self.window_s, self.overlap_s = window_s, overlap_s
        if window_s is not None:
            self._windows()  # which checks them
        self.w2v_path, self.dualcodec_path, self.meanvar_fname = w2v_path, dualcodec_path, meanvar_fname
        self.downsample_factor = downsample_factor
        self.device = torch.device(device)
        self.autocast_dtype = autocast_dtype(self.device, autocast)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, Tensor, Tensor] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the semantic model is in memory."""
        return self._loaded is not None

    @torch.no_grad()
    def __call__(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the features.

        Args:
            audio: [B, 1, S] float at 24 kHz, in [-1, 1], on any device.
            lengths: [B] int64, valid samples per item (None: all S): each item is normalised by its own
                samples and masked past them, and its features past its end are zero.

        Returns:
            [B, C, F] float32 on `device`; F may be one frame short of the audio's, and clips of less than a
            frame give none.

        Raises:
            DualCodecError: wrong audio, or files that are missing or don't fit together.
            MissingExtraError: transformers is not installed, or huggingface_hub for a hub name.
        """
        _check_audio("W2vBertFeatures", audio)
        whole = audio.shape[-1]
        if lengths is not None and not isinstance(lengths, Tensor):
            raise DualCodecError(
                f"W2vBertFeatures: lengths must be [{audio.shape[0]}] int64, got {type(lengths).__name__}"
            )
        sizes = [whole] * audio.shape[0] if lengths is None else lengths.tolist()
        if len(sizes) != audio.shape[0] or any(not 0 <= size <= whole for size in sizes):
            raise DualCodecError(f"W2vBertFeatures: lengths must be [{audio.shape[0]}] in [0, {whole}], got {sizes}")
        if self.window_s is not None and max(sizes, default=0) > WHOLE_S * CODEC_RATE_HZ:
            return self._clip_by_clip(audio, sizes)
        return self._whole(audio, sizes)

    def _windows(self) -> FeatureWindows:
        assert self.window_s is not None
        samples = self.downsample_factor * CODEC_RATE_HZ // 50
        return FeatureWindows(
            lambda part: self._whole(part, [part.shape[-1]]).cpu(),
            samples,
            CODEC_RATE_HZ,
            self.window_s,
            self.overlap_s,
        )

    def _clip_by_clip(self, audio: Tensor, sizes: list[int]) -> Tensor:
        clips = []
        for clip, size in zip(audio, sizes, strict=True):
            windows = self._windows()
            part = windows.write(clip[None, :, :size].cpu().to(torch.float32))
            clips.append(torch.cat([part, windows.finish()], -1))
        frames = max(clip.shape[-1] for clip in clips)
        return torch.cat([F.pad(clip, (0, frames - clip.shape[-1])) for clip in clips]).to(self.device)

    def _whole(self, audio: Tensor, sizes: list[int]) -> Tensor:
        extractor = self._load()[1]
        items = [_extract(extractor, clip[:, :size].cpu()) for clip, size in zip(audio, sizes, strict=True)]
        steps = max((item[0].shape[0] for item in items), default=0)
        frames = steps // self.downsample_factor
        if frames == 0:
            return torch.zeros(len(items), self._load()[2].numel(), 0, device=self.device)
        features = torch.stack([F.pad(item[0], (0, 0, 0, steps - item[0].shape[0])) for item in items])
        mask = torch.stack([F.pad(item[1], (0, steps - item[1].shape[0])) for item in items])
        hidden = self.hidden(features, mask)
        pooled = F.avg_pool1d(hidden.transpose(1, 2), self.downsample_factor, self.downsample_factor)
        own = torch.tensor([item[0].shape[0] // self.downsample_factor for item in items], device=self.device)
        return pooled.masked_fill(torch.arange(frames, device=self.device) >= own[:, None, None], 0.0)

    @torch.no_grad()
    def hidden(self, input_features: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the semantic model up to its 17th layer.

        Args:
            input_features: [B, T, 160] float, the feature extractor's.
            attention_mask: [B, T] int, 1 where input_features are valid.

        Returns:
            [B, T, C] float32, less the mean, over the standard deviation.
        """
        model, _, mean, std = self._load()
        half = self.autocast_dtype
        if isinstance(model, PackedLayers):
            with torch.autocast("cpu", enabled=False):
                return (model(input_features.cpu(), attention_mask.cpu()) - mean) / std
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            last = model(
                input_features=input_features.to(self.device, torch.float32),
                attention_mask=attention_mask.to(self.device),
            ).last_hidden_state
        return (last.to(torch.float32) - mean) / std

    def _load(self) -> tuple[Any, Any, Tensor, Tensor]:
        with self._lock:
            if self._loaded is None:
                need_extra("transformers", "semantic", "W2vBertFeatures")
                folder = find_directory(self.w2v_path, ["*.json", "*.safetensors"])
                statistics = find_file(self.dualcodec_path, self.meanvar_fname)
                model, extractor = load_w2v_bert(folder)
                mean, std = load_statistics(statistics, int(model.config.hidden_size))
                model = ready(model, self.device, self.autocast_dtype)
                self._loaded = (model, extractor, mean.to(self.device), std.to(self.device))
            return self._loaded


def _extract(extractor: Any, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Turn [1, S] at 24 kHz into the model's input [T, 160] and mask [T]."""
    at_16k = resample_24k_to_16k(clip.to(torch.float32))[0]
    if at_16k.numel() < _W2V_FEWEST_SAMPLES:
        return torch.zeros(0, extractor.feature_size * extractor.stride), torch.zeros(0, dtype=torch.int64)
    if takes_extractor(extractor):
        return fbank(extractor, at_16k)
    inputs = extractor(at_16k.numpy(), sampling_rate=_W2V_RATE_HZ, return_tensors="pt")
    return inputs["input_features"][0], inputs["attention_mask"][0].to(torch.int64)


def _check_audio(name: str, audio: Tensor) -> None:
    if not isinstance(audio, Tensor):
        raise DualCodecError(f"{name}: audio must be [B, 1, S] float, got {type(audio).__name__}")
    if audio.dim() != 3 or audio.shape[1] != 1 or not audio.is_floating_point():
        raise DualCodecError(f"{name}: audio must be [B, 1, S] float, got {list(audio.shape)} {audio.dtype}")
