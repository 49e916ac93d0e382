"""DualCodec, the drop-in: the reference's parameters and maths, the engine's speed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import reference
from ._snapshot import snapshot_of
from .errors import DualCodecError
from .ops import _common
from .ops._choice import ENGINE
from .reference.checks import check_lengths, check_waves
from .reference.ops import mask_past_lengths
from .semantic import LogMelFeatures

_ENGINE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FEATURES = "features."  # what the front end's statistics are called in a weights file
_building = threading.Lock()  # threads that meet at a model's first call wait for one engine
_packed_models: weakref.WeakSet[DualCodec] = weakref.WeakSet()


class DualCodec(reference.DualCodec):
    """The codec: `reference.DualCodec` whose encode, decode_from_codes and semantic_quantize run compiled kernels.

    Takes the reference's keyword arguments and loads its checkpoints. In eval mode those three methods go through an
    engine that holds folded, packed weights; it is built at the first call and again whenever a parameter has
    changed: `load_state_dict`, `.to`, optimiser steps and other in-place edits are seen. An edit through `.data` is
    not, nor one in place of a model that was made under `inference_mode`: call `repack()` after one. In train mode, on
    a device without kernels, and under `backend("reference")`, the reference runs.

    Numerics: float32 accumulation (float64 in float64 models); codes are searched in float32. The same input gives
        the same bits alone and in any batch, with any number of threads. Errors against float64 are at most twice
        plain PyTorch's. A decoded NaN reaches the samples whose groups of steps read it, some more than it has to.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._engine_state: tuple[Any, Any] | None = None
        self._compute_dtype: torch.dtype | None = None
        self._fast = False
        # Not a submodule: the state_dict is the reference's.
        is_mel = self.settings["semantic_dim"] == LogMelFeatures.channels
        with torch.device("cpu"):  # its values are computed, also where the parameters have none
            self._front_end = (LogMelFeatures(self.semantic_downsample_factor),) if is_mel else ()
        self._released = False  # only the engine is left
        self._freed = False  # the parameters are gone

    # Construction ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "12hz_v1",
        *,
        weights: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> DualCodec:
        """Build a model and load a checkpoint into it.

        Args:
            source: a preset's name, or a directory or safetensors file that holds a checkpoint.
            weights: for a preset, where its checkpoint is: a directory, a safetensors file, or a hub name such as
                `hf://amphion/dualcodec` (None: that one).
            dtype: of the parameters.
            device: of the parameters.

        Returns:
            The model in eval mode.

        Raises:
            DualCodecError: no such preset, no such file, or a checkpoint of another model.
            MissingExtraError: a hub name without huggingface_hub installed.
        """
        from .hub import resolve_pretrained

        config, path = resolve_pretrained(source, weights)
        model = cls(**config.to_dict())
        model.load_checkpoint(path)
        return model.to(device=device, dtype=dtype).eval()

    def load_checkpoint(self, path: str | Path) -> None:
        """Load a safetensors file with exactly this model's keys; else raise DualCodecError and change nothing.

        Of a model on log-mel features the file may also hold their statistics, `features.mean` and `.variance`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(str(path))
        except FileNotFoundError:
            raise DualCodecError(f"checkpoint: {path} must be a safetensors file, it does not exist") from None
        except (SafetensorError, OSError) as error:
            raise DualCodecError(f"checkpoint: {path} must be a readable safetensors file: {error}") from None
        statistics = {name: state.pop(FEATURES + name, None) for name in ("mean", "variance")}
        _check_state(state, self.state_dict(), path)
        mean, variance = statistics.values()
        for mel in self._front_end:
            if mean is not None and variance is not None:
                mel.set_statistics(mean, variance)
        self.load_state_dict(state)

    # Features -------------------------------------------------------------------------------------------------------

    @property
    def front_end(self) -> LogMelFeatures | None:
        """What computes the model's semantic features where it takes log-mel ones."""
        return self._front_end[0] if self._front_end else None

    @property
    def has_front_end(self) -> bool:
        """Whether the model computes its own semantic features: it takes log-mel ones."""
        return bool(self._front_end)

    @torch.no_grad()
    def semantic_features(self, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the features that `encode` takes, of a model on log-mel features.

        Args:
            audio: [B, 1, S] float at 24 kHz, in [-1, 1].
            lengths: [B] int64, valid samples per item; those past it count as zero.

        Returns:
            [B, 160, ceil(S / hop)] in the dtype of activations, on audio's device.

        Raises:
            DualCodecError: the model takes other features.
            ValueError: wrong audio or lengths; one line.
        """
        if not self._front_end:
            raise DualCodecError(
                f"DualCodec.semantic_features: this model takes features of {self.settings['semantic_dim']} channels,"
                " which it does not compute itself: Inference does"
            )
        return self._features_of("DualCodec.semantic_features", "audio", audio, lengths)

    def _features_of(self, name: str, argument: str, audio: Tensor, lengths: Tensor | None) -> Tensor:
        check_waves(name, argument, audio)
        if lengths is not None:
            check_lengths(name, lengths, audio)
        assert self.front_end is not None
        mel = self.front_end.to(audio.device)
        return mel(mask_past_lengths(audio, lengths)).to(self.compute_dtype)

    def _own_features(self, name: str, audio_data: Tensor, lengths: Tensor | None) -> Tensor | None:
        return self._features_of(name, "audio_data", audio_data, lengths) if self._front_end else None

    # Engine ---------------------------------------------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations and audio: that of the parameters, unless `accelerate` was given another one."""
        return self._compute_dtype or next(self.parameters()).dtype

    @property
    def fast(self) -> bool:
        """Whether decode takes the faster, less exact path: `set_fast`."""
        return self._fast

    def set_fast(self, fast: bool = True) -> DualCodec:
        """Choose whether `decode_from_codes` takes a faster, less exact path, and return the model.

        The fast path runs the k=7 convolutions of the decoder's residual units in a Winograd form with fewer
        multiplications and more rounding than the one that decode otherwise takes in float32 on the CPU. `encode` and
        `semantic_quantize` stay as they are, codes included. The weights are packed again at the next call; a copy or a
        pickle keeps the choice, a state_dict does not hold it.
        The reference (train mode, `backend("reference")`) takes no notice of it.

        Numerics: decoded samples within 1e-4 of full scale of the float64 reference's.

        Raises:
            DualCodecError: the model computes in another dtype than float32 or on another device than the CPU, now or
                when it next runs; or its parameters were released under the other choice.
        """
        fast = bool(fast)
        if self._released and fast != self._fast:
            raise DualCodecError("DualCodec.set_fast: must come before release=True, which has freed the parameters")
        if fast and not self._released:
            parameter = next(self.parameters())
            _check_fast(parameter.device, self.compute_dtype)
        self._fast = fast
        return self

    def prepare(self) -> None:
        """Pack the weights now rather than at the first call; nothing where the reference is to run."""
        if not self.training:
            self._engine()

    def repack(self) -> None:
        """Forget the packed weights.

        Needed after edits that PyTorch does not count: those through `.data`, and in-place ones of a model that was
        made under `inference_mode`.
        """
        if not self._released:
            self._engine_state = None

    def _engine(self) -> Any | None:
        """Return the engine to run on, or None when the reference is to run."""
        if self._released:
            graphs = self._engine_state[1] if self._engine_state else None
            device = torch.device("cpu") if graphs is None else graphs.engine.device
            if _common.choose_backend(device, self.compute_dtype, ENGINE) == "reference":
                raise DualCodecError("DualCodec: the reference needs the parameters, which release=True has freed")
            return graphs
        parameter = next(self.parameters())
        self._freed = self._freed or parameter.numel() == 0  # through another object that shares them
        self._check_parameters()
        dtype = self._compute_dtype or parameter.dtype
        if dtype not in _ENGINE_DTYPES or _common.choose_backend(parameter.device, dtype, ENGINE) == "reference":
            return None
        if self._fast:
            _check_fast(parameter.device, dtype)
        state = self._engine_state
        if state is None or not self._is_current(state):
            from .engine import Engine
            from .graphs import Graphs

            with _building:
                state = self._engine_state
                if state is None or not self._is_current(state):
                    self._engine_state = state = None  # the old weights go before the new ones come
                    packed = (self._compute_dtype, self._fast, snapshot_of(self))
                    self._engine_state = state = (packed, Graphs(Engine(self, dtype, self._fast)))
                    _packed_models.add(self)
        return state[1]

    def _is_current(self, state: tuple[Any, Any]) -> bool:
        """Whether an engine has the settings and the weights of now."""
        dtype, fast, snapshot = state[0]
        return dtype == self._compute_dtype and fast == self._fast and snapshot.holds()

    def _check_parameters(self) -> None:
        if self._freed:
            raise DualCodecError("DualCodec: this needs the parameters, which release=True has freed")

    def release(self) -> None:
        """Pack the weights and free the parameters; the model then encodes and decodes, and nothing else."""
        if self.training:
            raise DualCodecError("DualCodec.release: the model must be in eval mode, got training mode")
        if self._engine() is None:
            raise DualCodecError(
                "DualCodec.release: the engine must be able to run here; dx.doctor() says why it is not"
            )
        self._compute_dtype = self.compute_dtype
        self._released = self._freed = True
        for parameter in self.parameters():
            parameter.data = parameter.data.new_empty(0)

    def __getstate__(self) -> dict[str, Any]:
        if self._released:
            raise DualCodecError("DualCodec: a model whose parameters were released can't be copied or pickled")
        return {**self.__dict__, "_engine_state": None}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._check_parameters()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._check_parameters()
        self.repack()  # of a model made under inference_mode the copies are not counted
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> DualCodec:
        if mode:
            self._check_parameters()
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_parameters()
        return super().forward(*args, **kwargs)

    def decode_from_codes(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None = None,
        lengths: Tensor | None = None,
        chunk_frames: int | None = None,
    ) -> Tensor:
        audio = self._again(semantic_codes, acoustic_codes) if lengths is None and chunk_frames is None else None
        if audio is not None:
            return audio
        return super().decode_from_codes(semantic_codes, acoustic_codes, lengths, chunk_frames)

    # What the reference's public methods call once their arguments are checked ----------------------------------------

    def _encode(
        self,
        audio: Tensor | None,
        feat: Tensor,
        num_quantizers: int | None,
        sample_lengths: Tensor | None,
        frame_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        engine = self._engine()
        if engine is None:
            return super()._encode(audio, feat, num_quantizers, sample_lengths, frame_lengths)
        if num_quantizers != 1 and audio is not None and engine.engine.device.type != "cpu":
            audio, sample_lengths = self._whole_frames(audio, sample_lengths)
        return engine.encode(*_as_engines_take(audio, feat, num_quantizers, sample_lengths, frame_lengths))

    def _decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None) -> Tensor:
        own = None if frame_lengths is None else frame_lengths.cpu()
        audio = self._replay(semantic_codes, acoustic_codes, own)
        if audio is not None:
            return audio
        engine = self._engine()
        if engine is None:
            return super()._decode(semantic_codes, acoustic_codes, frame_lengths)
        return engine.decode(semantic_codes, acoustic_codes, own)

    def _replay(self, semantic: Tensor, acoustic: Tensor | None, own: Tensor | None) -> Tensor | None:
        """Decode by a recording of the last engine; None where there is none, or where it is not to run any more.

        Its weights are looked at while the GPU works on them already, and what comes of old ones is dropped.
        """
        state = self._engine_state
        if state is None or not state[1].records or not state[1].chosen():
            return None
        audio: Tensor | None = state[1].replay_decode(semantic, acoustic, own, lambda: self._holds(state))
        return audio

    def _again(self, semantic: Tensor, acoustic: Tensor | None) -> Tensor | None:
        """Decode codes as they were given, of a shape that has been decoded; None where there is more to find out."""
        state, held = self._engine_state, True
        if state is None:
            return None

        def holds() -> bool:
            nonlocal held
            held = self._holds(state)
            return held

        audio: Tensor | None = state[1].decode_again(semantic, acoustic, holds)
        if not held:
            with _building:  # its weights are old: it need not be replayed once more
                self._engine_state = None if self._engine_state is state else self._engine_state
        return audio

    def _holds(self, state: tuple[Any, Any]) -> bool:
        return self._released or self._is_current(state)

    # Long clips -------------------------------------------------------------------------------------------------------

    def _cpu_engine(self) -> Any | None:
        """Return the engine where it runs in tiles, which need no context computed twice."""
        graphs = self._engine()
        return graphs.engine if graphs is not None and graphs.engine.device.type == "cpu" else None

    def _decoder_groups(self) -> Sequence[int] | None:
        graphs = self._engine()
        return None if graphs is None else graphs.engine.decoder_groups()

    def _decode_long(
        self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None, chunk_frames: int
    ) -> Tensor:
        engine = self._cpu_engine()
        if engine is None:
            return super()._decode_long(semantic_codes, acoustic_codes, frame_lengths, chunk_frames)
        lengths = None if frame_lengths is None else frame_lengths.cpu()
        return engine.decode_clips(semantic_codes, acoustic_codes, lengths, chunk_frames)

    def _decode_pieces(
        self, semantic_codes: Tensor, acoustic_codes: Tensor | None, frame_lengths: Tensor | None, chunk_frames: int
    ) -> Iterator[Tensor]:
        engine = self._cpu_engine()
        if engine is None or frame_lengths is not None:
            return super()._decode_pieces(semantic_codes, acoustic_codes, frame_lengths, chunk_frames)
        return engine.decode_pieces(semantic_codes, acoustic_codes, chunk_frames)

    def _encode_long(
        self,
        audio: Tensor | None,
        feat: Tensor,
        num_quantizers: int | None,
        sample_lengths: Tensor | None,
        frame_lengths: Tensor | None,
        chunk_frames: int,
    ) -> tuple[Tensor, Tensor | None]:
        engine = self._cpu_engine()
        if engine is None:
            return super()._encode_long(audio, feat, num_quantizers, sample_lengths, frame_lengths, chunk_frames)
        taken = _as_engines_take(audio, feat, num_quantizers, sample_lengths, frame_lengths)
        return engine.encode_clips(*taken, chunk_frames)

    def _encode_pieces(
        self, pieces: Iterable[tuple[Tensor, Tensor]], num_quantizers: int | None, chunk_frames: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        engine = self._cpu_engine()
        if engine is None:
            return super()._encode_pieces(pieces, num_quantizers, chunk_frames)
        return engine.encode_pieces(pieces, None if num_quantizers is None else num_quantizers - 1, chunk_frames)


def _as_engines_take(
    audio: Tensor | None,
    feat: Tensor,
    num_quantizers: int | None,
    sample_lengths: Tensor | None,
    frame_lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor, int | None, Tensor | None, Tensor | None]:
    """Turn what `_encode` is given into what engines take: acoustic codebooks alone, and lengths on the CPU."""
    heard = None if num_quantizers == 1 else audio
    stages = None if num_quantizers is None else num_quantizers - 1
    frames = None if frame_lengths is None else frame_lengths.cpu()
    samples = None if heard is None or sample_lengths is None else sample_lengths.cpu()
    return heard, feat, stages, frames, samples


def _check_fast(device: torch.device, dtype: torch.dtype) -> None:
    if dtype != torch.float32 or device.type not in ("cpu", "meta"):
        raise DualCodecError(
            f"DualCodec: fast needs float32 on the CPU, got {str(dtype).removeprefix('torch.')} on {device}; "
            "set_fast(False) turns it off"
        )


def _repack_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # PyTorch does not count a fused step as an edit of the parameters.
    groups = [group for group in optimizer.param_groups if group.get("fused")]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    for model in list(_packed_models) if stepped else []:
        if any(id(parameter) in stepped for parameter in model.parameters()):
            model.repack()


register_optimizer_step_post_hook(_repack_after_step)


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]} ({len(missing)} such)" if missing else f"has {extra[0]} ({len(extra)} such)"
        raise DualCodecError(f"checkpoint: {path} must have this model's parameters, it {what}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise DualCodecError(
                f"checkpoint: {name} must be {list(expected[name].shape)}, got {list(tensor.shape)} in {path}"
            )
