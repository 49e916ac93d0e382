"""Audio in pieces to codes, for models whose encoders look at no future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._stream_graph import GraphEncoder
from ._stream_passes import CpuEncoder
from ._stream_slots import Slots, check_rows, stream_engine, whole_number
from .errors import DualCodecError
from .model import DualCodec
from .reference.checks import MOST_SHORT_FRAMES
from .semantic import LogMelFeatures

_STATE_VERSION = 1


class StreamingEncoder(Slots):
    """Encodes `batch_size` streams, each a slot of its own, as their audio arrives.

    A frame's codes come as soon as its samples and its features are there, and are those that `encode` gives for the
    whole clip; on a GPU, but where a margin is within float32's rounding. A slot's codes depend neither on how its
    audio and features are cut nor on other slots.

    Args:
        model: a `DualCodec` in eval mode with a causal encoder (`12hz_stream`); its weights of now stay.
        batch_size: slots.
        max_frames: frames of one pass; None: 16 over batch_size, at least 1.
        num_quantizers: codebooks to use, the semantic one included: 1 needs no audio, None takes all.
        front_end: computes the features from the audio; `step` then takes audio alone. None: the model's own where it
            has one (`tiny`), else `step` takes features too.

    Attributes:
        frame_counts: frames of each slot in what the last step or flush returned.

    Raises:
        DualCodecError: a wrong argument, an encoder that looks ahead, or no engine for the model here.
    """

    name = "StreamingEncoder"

    def __init__(
        self,
        model: DualCodec,
        batch_size: int = 1,
        max_frames: int | None = None,
        num_quantizers: int | None = None,
        front_end: LogMelFeatures | None = None,
    ) -> None:
        self._set_batch(batch_size)
        most = max(1, 16 // batch_size) if max_frames is None else whole_number(self.name, "max_frames", max_frames, 1)
        all_stages = model.settings["n_codebooks"] if isinstance(model, DualCodec) else 0
        stages = all_stages
        if num_quantizers is not None:
            stages = min(whole_number(self.name, "num_quantizers", num_quantizers, 1) - 1, all_stages)
        engine = stream_engine(self.name, model)
        front_end = model.front_end if front_end is None else front_end
        self._hop, self._dim, self.max_frames = engine.hop_samples, model.settings["semantic_dim"], most
        if front_end is not None and not isinstance(front_end, LogMelFeatures):
            raise DualCodecError(f"{self.name}: front_end must be a LogMelFeatures, got {type(front_end).__name__}")
        if front_end is not None and (front_end.hop_samples, front_end.channels) != (self._hop, self._dim):
            raise DualCodecError(
                f"{self.name}: front_end must give {self._dim} channels every {self._hop} samples, got"
                f" {front_end.channels} every {front_end.hop_samples}"
            )
        self._front_end = front_end
        programs, self._device = engine.tiles.programs, engine.device
        self._passes: CpuEncoder | GraphEncoder
        if engine.device.type == "cpu":
            self._passes = CpuEncoder(self.name, programs, batch_size, most, stages)
        else:
            self._passes = GraphEncoder(self.name, programs, batch_size, stages, engine.device)
        self._dtype = engine.dtype
        # On the model's device: samples [n] that wait for the rest of their frame, features [dim, n] that wait for
        # their audio, and the front end's past [hop].
        self._audio = [torch.zeros(0, device=self._device)] * batch_size
        self._features = [torch.zeros(self._dim, 0, device=self._device)] * batch_size
        self._before = [torch.zeros(self._hop, device=self._device)] * batch_size
        self.frame_counts = [0] * batch_size

    @torch.no_grad()
    def step(
        self,
        audio: Tensor | None = None,
        semantic_repr: Tensor | None = None,
        mask: Tensor | Sequence[bool] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take the next samples and features of the slots, and return the codes of the frames that are complete.

        Args:
            audio: [B, 1, S] float, any S; None: no samples.
            semantic_repr: [B, semantic_dim, F] float, any F; None: no features. With a front end there are none.
            mask: [B] bool, the slots that take part; None: all.

        Returns:
            Semantic codes [B, 1, f] int64, and acoustic codes [B, q, f] int64 or None; f the most frames that a slot
            got; row b begins with frame_counts[b] of them, zeros follow.

        Raises:
            ValueError: a wrong shape. DualCodecError: a wrong mask.
        """
        slots = self._taking_part(mask)
        if audio is not None:
            self._check("audio", audio, 1, "S")
        if semantic_repr is not None:
            if self._front_end is not None:
                raise ValueError(f"{self.name}.step: semantic_repr must be None with a front end")
            self._check("semantic_repr", semantic_repr, self._dim, "F")
        for b in slots:
            if audio is not None and (self._passes.stages or self._front_end is not None):
                self._audio[b] = torch.cat([self._audio[b], audio[b, 0].to(self._audio[b])])
            if semantic_repr is not None:
                self._features[b] = torch.cat([self._features[b], semantic_repr[b].to(self._features[b])], 1)
        return self._encode(slots)

    @torch.no_grad()
    def flush(self, mask: Tensor | Sequence[bool] | None = None) -> tuple[Tensor, Tensor | None]:
        """End the clips of slots, whose last frame is filled with zeros; their next step begins a new clip.

        Args:
            mask: [B] bool, the slots whose clips end; None: all.

        Returns:
            As `step`.

        Raises:
            DualCodecError: features without audio, or more than 2 frames of audio without features, as `encode` has it.
        """
        slots = self._taking_part(mask)
        hears = self._passes.stages > 0 or self._front_end is not None
        for b in slots:
            whole, features = -(-self._audio[b].numel() // self._hop), self._features[b].shape[1]
            if self._front_end is None and hears and not whole - MOST_SHORT_FRAMES <= features <= whole:
                raise DualCodecError(
                    f"{self.name}.flush: slot {b} must have features for its {whole} last frames, or up to"
                    f" {MOST_SHORT_FRAMES} fewer, got {features}"
                )
            self._audio[b] = F.pad(self._audio[b], (0, -self._audio[b].numel() % self._hop))
        codes = self._encode(slots)
        self._reset(slots)
        return codes

    def reset(self, mask: Tensor | Sequence[bool] | None = None) -> None:
        """Forget the clips of slots, whose next step begins a new one.

        Args:
            mask: [B] bool; None: all slots.
        """
        self._reset(self._taking_part(mask))

    def _reset(self, slots: Sequence[int]) -> None:
        for b in slots:
            self._passes.state[b].zero_()
            self._audio[b], self._features[b] = self._audio[b][:0], self._features[b][:, :0]
            self._before[b] = torch.zeros(self._hop, device=self._device)

    def state_dict(self, mask: Tensor | Sequence[bool] | None = None) -> dict[str, Any]:
        """Return where streams stand: another encoder of the same model and codebooks goes on from there.

        Args:
            mask: [B] bool, the slots that are taken; None: all.

        Returns:
            Copies on the CPU, in the slots' order: `state` [n, ..] of the layers, `before` [n, hop] of the front end;
            of each slot `audio` [s] and `features` [semantic_dim, f] that wait; and what has to agree.
        """
        slots = list(self._taking_part(mask))
        return {
            "state": self._passes.state[slots].cpu(),
            "before": torch.stack([self._before[b] for b in slots]).cpu() if slots else torch.zeros(0, self._hop),
            "audio": [self._audio[b].to("cpu", copy=True) for b in slots],
            "features": [self._features[b].to("cpu", copy=True) for b in slots],
            **self._kind(),
        }

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor | Sequence[bool] | None = None) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: of an encoder of the same model, codebooks and kind of front end, of any batch size.
            mask: [B] bool, as many slots as the state holds, which take them in order; None: all slots.

        Raises:
            DualCodecError: the state of another version, model, dtype, or of another number of slots or codebooks; no
                slot has then changed.
        """
        name = self._agreeing(state, self._kind())
        slots, own_rows = list(self._taking_part(mask)), self._passes.state
        n, float32 = len(slots), torch.float32
        rows = check_rows(name, "state", state.get("state"), (n, own_rows.shape[1]), own_rows.dtype)
        before = check_rows(name, "before", state.get("before"), (n, self._hop), float32)
        waiting: list[list[Tensor]] = []
        for what, shape in (("audio", (None,)), ("features", (self._dim, None))):
            given = state.get(what)
            if not isinstance(given, Sequence) or len(given) != n:
                came = len(given) if isinstance(given, Sequence) else type(given).__name__
                raise DualCodecError(f"{name}: {what} must hold a tensor per slot, {n}, got {came}")
            waiting.append([check_rows(name, what, x, shape, float32).to(self._device, copy=True) for x in given])
        for i, b in enumerate(slots):
            own_rows[b].copy_(rows[i])
            self._before[b] = before[i].to(self._device, copy=True)
            self._audio[b], self._features[b] = waiting[0][i], waiting[1][i]

    def _kind(self) -> dict[str, object]:
        """What a state has to agree with, beside the shapes of its rows."""
        return {
            "version": _STATE_VERSION,
            "acoustic_codebooks": self._passes.stages,
            "front_end": self._front_end is not None,
        }

    def _check(self, what: str, x: Tensor, channels: int, steps: str) -> None:
        wanted = f"[{self.batch_size}, {channels}, {steps}] float"
        if not isinstance(x, Tensor):
            raise ValueError(f"{self.name}.step: {what} must be {wanted}, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[:2] != (self.batch_size, channels) or not x.is_floating_point():
            raise ValueError(f"{self.name}.step: {what} must be {wanted}, got {list(x.shape)} {x.dtype}")

    def _ready(self, b: int) -> int:
        heard = self._audio[b].numel() // self._hop
        if self._front_end is not None:
            return heard
        there = self._features[b].shape[1]
        return min(heard, there) if self._passes.stages else there

    def _encode(self, slots: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        ready = {b: self._ready(b) for b in slots}
        most, stages = max(ready.values(), default=0), self._passes.stages
        semantic = torch.zeros(self.batch_size, 1, most, dtype=torch.int64, device=self._device)
        acoustic = semantic.new_zeros(self.batch_size, stages, most) if stages else None
        done = [0] * self.batch_size
        while waiting := tuple(b for b in slots if done[b] < ready[b]):
            frames = min(self.max_frames, *(ready[b] - done[b] for b in waiting))
            audio, features = self._take(waiting, frames)
            found = self._passes.run(waiting, features, audio if stages else None, frames)
            at = done[waiting[0]]
            together, rows = all(done[b] == at for b in waiting), list(waiting)
            for codes, given in ((semantic, found[0]), (acoustic, found[1])):
                if codes is None or given is None:
                    continue
                if together:
                    codes[rows, :, at : at + frames] = given
                    continue
                for i, b in enumerate(waiting):
                    codes[b, :, done[b] : done[b] + frames] = given[i]
            for b in waiting:
                done[b] += frames
        self.frame_counts = done
        return semantic, acoustic

    def _take(self, slots: Sequence[int], frames: int) -> tuple[Tensor | None, Tensor]:
        """Return audio [n, 1, frames * hop] and features [n, dim, frames], and let go of them."""
        samples = frames * self._hop
        audio = None
        if self._passes.stages or self._front_end is not None:
            audio = torch.stack([self._audio[b][:samples] for b in slots])[:, None]
        if self._front_end is not None and audio is not None:
            before = torch.stack([self._before[b] for b in slots])[:, None]
            # Of a frame's windows none begins before the frame ahead of it.
            features = self._front_end(torch.cat([before, audio], 2).to(self._front_end.mean.device))[:, :, 1:]
        else:
            features = torch.stack([self._features[b][:, :frames] for b in slots])
        if audio is not None:
            for b, last in zip(slots, audio[:, 0, samples - self._hop :].clone().unbind(0), strict=True):
                self._before[b], self._audio[b] = last, self._audio[b][samples:]
        if self._front_end is None:
            for b in slots:
                self._features[b] = self._features[b][:, frames:]
        return audio, features
