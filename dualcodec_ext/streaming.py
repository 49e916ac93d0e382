"""Streams: codes in and audio out, or the other way round, frame by frame, with the values of whole clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._stream_cpu import CpuDecoder, span_of
from ._stream_encoder import StreamingEncoder
from ._stream_graph import GraphDecoder
from ._stream_plan import cuts_for, make_layers, totals, whole_frames
from ._stream_slots import Slots, check_rows, got, stream_engine, whole_number
from .engine import Engine
from .errors import DualCodecError
from .forms import unit_products
from .model import DualCodec
from .reference.checks import check_codes, naming_wrong_codes
from .reference.dac import DecoderBlock
from .reference.layers import CausalUpsample, WNConvTranspose1d
from .stages import stage_of
from .steps import ResidualUnitStep, Step, UpsampleStep, weight_dtype

__all__ = ["StreamingDecoder", "StreamingEncoder"]

_STATE_VERSION = 1


# Rows per frame from which a residual unit takes the engine's form, whose groups then begin with every frame: with 16
# rows its largest dilation would compute 36.
_GROUPED_ROWS = 48


def decoder_steps(model: DualCodec, engine: Engine) -> list[Step]:
    """Return the decoder's steps, residual units and upsamplings in the forms that streams take.

    The form goes by the rows per frame alone, so that a slot's bits do not depend on the others; an upsampling's groups
    would span frames. Parameters that were released leave the engine's own forms.
    """
    steps = list(engine.tiles.programs.decoder)
    if model._released:
        if any(isinstance(step, UpsampleStep) and step.granularity > 1 for step in steps):
            raise DualCodecError(
                "StreamingDecoder: model must hold its parameters, its upsamplings are packed anew, got a released one"
            )
        return steps
    dtype = weight_dtype(engine.dtype, engine.device)
    modules = list(model.dac.decoder.modules())
    units = (module for module in modules if isinstance(module, reference.ResidualUnit))
    blocks: Iterator[nn.Sequential] = (module.block for module in modules if isinstance(module, DecoderBlock))
    for i, layer in enumerate(make_layers(steps)):
        if isinstance(layer.step, ResidualUnitStep):
            form, unit = engine.form if layer.out_rows >= _GROUPED_ROWS else "direct", next(units)
            if layer.step.winograd != unit_products(form, layer.step.tensors[1].shape[0]):
                steps[i] = ResidualUnitStep.of(unit, dtype, form)
        elif isinstance(layer.step, UpsampleStep):
            block = next(blocks)
            snake, upsample = block[0], block[1]
            assert isinstance(snake, reference.Snake1d) and isinstance(upsample, WNConvTranspose1d | CausalUpsample)
            if layer.step.granularity > 1:
                steps[i] = UpsampleStep.of(snake.alpha, upsample, dtype)
    return steps


class StreamingDecoder(Slots):
    """Decodes `batch_size` streams, each a slot of its own, as their codes arrive.

    The pieces of a stream, one behind the other, are what `decode_from_codes` gives for all of its codes: as many
    samples, and the same values but for rounding. Each layer keeps the rows that it still needs, so that nothing is
    computed twice. A slot's bits depend neither on how its codes are cut nor on other slots, however many there are.

    Args:
        model: a `DualCodec` in eval mode; its weights are those of now.
        batch_size: slots. One that takes no part in a step costs its memory alone; on a GPU a step computes all.
        max_frames: frames of one pass; a step with more is made in several, and working memory goes by it. None: 16
            over batch_size, at least 1.
        lookahead: frames that the output may run behind. None, or as many as the layers need: exact. Fewer: where a
            layer would need rows past the newest frame allowed, those count as zeros, as at a clip's end; frames then
            go one by one. With 0 a centred decoder gives F * hop samples, a few more than the whole decode.
            `python -m bench lookahead` measures the error of each choice.

    Attributes:
        lookahead_frames: frames that have to follow a frame before all of its samples are out.
        latency_ms: the same, in milliseconds.
        sample_counts: samples of each slot in what the last step or flush returned.

    Raises:
        DualCodecError: a wrong argument, or no engine for the model here.

    Numerics: as the model's engine, but for upsamplings and for the residual units of layers of few rows, which take
        their direct form. Not safe to share among threads. On a GPU a step returns before its audio is there, as
        PyTorch's calls do: all calls belong on one CUDA stream.
    """

    name = "StreamingDecoder"

    def __init__(
        self,
        model: DualCodec,
        batch_size: int = 1,
        max_frames: int | None = None,
        lookahead: int | None = None,
    ) -> None:
        self._set_batch(batch_size)
        for what, value, least in (("max_frames", max_frames, 1), ("lookahead", lookahead, 0)):
            if value is not None:
                whole_number(self.name, what, value, least)
        self._engine = engine = stream_engine(self.name, model)
        programs = engine.tiles.programs
        steps = [*programs.semantic_decoder, *decoder_steps(model, engine)]
        needed = whole_frames(make_layers(steps))
        cut = lookahead is not None and lookahead < needed
        layers = make_layers(steps, cuts=cuts_for(steps, lookahead) if cut and lookahead is not None else None)
        before = len(programs.semantic_decoder)
        self._layers = layers
        self._hop, self._delay = engine.hop_samples, layers[-1].out_delay
        self.lookahead_frames = whole_frames(layers)
        self.latency_ms = 1e3 * self.lookahead_frames * self._hop / model.dac.sample_rate
        self.max_frames = 1 if cut else max(1, 16 // batch_size) if max_frames is None else max_frames
        self._stages = model.dac.n_codebooks
        self._run: CpuDecoder | GraphDecoder
        if engine.device.type == "cpu":
            self._run = CpuDecoder(programs, layers[:before], layers[before:], batch_size, self.max_frames)
        else:
            self._run = GraphDecoder(programs, layers[:before], layers[before:], batch_size, engine.device)
        self._frames = [0] * batch_size
        self.sample_counts = [0] * batch_size

    # Streams --------------------------------------------------------------------------------------------------------

    def step(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None = None,
        mask: Tensor | Sequence[bool] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Take the next frames of the slots, and return the samples that they complete.

        Args:
            semantic_codes: [B, 1, F] integers, B = batch_size, F from 0.
            acoustic_codes: [B, q, F] integers, the first q codebooks, another q at every step if need be; None: the
                semantic codes alone.
            mask: [B] bool, the slots that take part; None: all. What the codes hold for the others does not matter.
            out: [B, 1, F * hop] of the model's dtype to write into; without it the result is a new tensor.

        Returns:
            Audio [B, 1, S], S the most samples that a slot got; row b begins with sample_counts[b] samples, zeros
            follow. Past its first frames a slot gets F * hop samples.

        Raises:
            ValueError: a wrong shape, or a code out of range; no slot has then changed.
            DualCodecError: a wrong mask or out.
        """
        if mask is None:
            audio = self._step_again(semantic_codes, acoustic_codes, out)
            if audio is not None:
                return audio
        return self._step(semantic_codes, acoustic_codes, mask, out)

    def _step_again(self, semantic: Tensor, acoustic: Tensor | None, out: Tensor | None) -> Tensor | None:
        """A step of all slots that has been before, on a GPU, before its arguments are checked; None: none of those."""
        if not isinstance(self._run, GraphDecoder) or min(self._frames) * self._hop < self._delay:
            return None
        audio = self._run.run_again(semantic, acoustic, out)
        if audio is not None:
            frames = semantic.shape[2]
            self._frames = [count + frames for count in self._frames]
            self.sample_counts = [frames * self._hop] * self.batch_size
        return audio

    @torch.no_grad()
    def _step(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None,
        mask: Tensor | Sequence[bool] | None,
        out: Tensor | None,
    ) -> Tensor:
        semantic_codes, acoustic_codes = self._check_codes(semantic_codes, acoustic_codes)
        slots, frames = self._taking_part(mask), semantic_codes.shape[2]
        audio = self._result(out, frames * self._hop)
        if not frames or not slots:
            self.sample_counts = [0] * self.batch_size
            return audio[..., :0]
        if len(slots) < self.batch_size:
            index = list(slots)
            semantic_codes = semantic_codes[index]
            acoustic_codes = None if acoustic_codes is None else acoustic_codes[index]
        if len(slots) < self.batch_size or frames > self.max_frames:
            self._check_range("semantic_codes", semantic_codes, self._engine.semantic_entries, slots)
            if acoustic_codes is not None:
                self._check_range("acoustic_codes", acoustic_codes, self._engine.acoustic_entries, slots)
        entries = self._engine.semantic_entries, self._engine.acoustic_entries
        with naming_wrong_codes(f"{self.name}.step", semantic_codes, acoustic_codes, entries):
            return self._pieces(slots, semantic_codes, acoustic_codes, frames, audio, None)

    @torch.no_grad()
    def flush(self, mask: Tensor | Sequence[bool] | None = None) -> Tensor:
        """End the clips of slots, and return what is left of them; their next step begins a new clip.

        Args:
            mask: [B] bool, the slots whose clips end; None: all.

        Returns:
            Audio [B, 1, S], as `step`; without look-ahead, and at once again, it is empty.
        """
        slots = tuple(b for b in self._taking_part(mask) if self._frames[b])
        lengths = [self._frames[b] for b in slots]
        wanted = [totals(self._layers, n)[-1] for n in lengths]
        # Frames of zeros until the last sample is out.
        frames = max((-(-(t + self._delay) // self._hop) - n for t, n in zip(wanted, lengths, strict=True)), default=0)
        audio = self._result(None, frames * self._hop)
        if frames > 0:
            audio = self._pieces(slots, None, None, frames, audio, lengths)
        else:
            self.sample_counts = [0] * self.batch_size
            audio = audio[..., :0]
        self.reset_slots(slots)
        return audio

    def reset(self, mask: Tensor | Sequence[bool] | None = None) -> None:
        """Forget the clips of slots, whose next step begins a new one.

        Args:
            mask: [B] bool; None: all slots.
        """
        self.reset_slots(self._taking_part(mask))

    def reset_slots(self, slots: Sequence[int]) -> None:
        """As `reset`, of the slots with these numbers."""
        for b in slots:
            self._run.state[b].zero_()
            self._frames[b] = 0

    @property
    def frame_counts(self) -> list[int]:
        """Frames that each slot's clip has had."""
        return list(self._frames)

    def state_bytes(self) -> int:
        """Return the memory of the slots' state and of what a step works in, without the weights."""
        return self._run.bytes()

    def weight_bytes(self) -> int:
        """Return the packed weights that a step reads, without the codebooks."""
        return sum(stage_of(layer.step).weight_bytes() for layer in self._layers)

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self, mask: Tensor | Sequence[bool] | None = None) -> dict[str, Any]:
        """Return where streams stand: another decoder of the same model and look-ahead goes on from there.

        Args:
            mask: [B] bool, the slots that are taken; None: all.

        Returns:
            Copies, on the CPU: `state` [n, ..] and `frames` [n] int64 in the slots' order, and what has to agree.
        """
        slots = list(self._taking_part(mask))
        return {
            "state": self._run.state[slots].cpu(),
            "frames": torch.tensor([self._frames[b] for b in slots], dtype=torch.int64),
            "version": _STATE_VERSION,
            "lookahead_frames": self.lookahead_frames,
        }

    def load_state_dict(self, state: Mapping[str, Any], mask: Tensor | Sequence[bool] | None = None) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: of a decoder of the same model and look-ahead, of any batch size.
            mask: [B] bool, as many slots as the state holds, which take them in order; None: all slots.

        Raises:
            DualCodecError: the state of another version, dtype or look-ahead, of a model of other shapes, or of another
                number of slots.
        """
        name = self._agreeing(state, {"version": _STATE_VERSION, "lookahead_frames": self.lookahead_frames})
        slots, own_rows = list(self._taking_part(mask)), self._run.state
        rows = check_rows(name, "state", state.get("state"), (len(slots), own_rows.shape[1]), own_rows.dtype)
        counts = check_rows(name, "frames", state.get("frames"), (len(slots),), torch.int64)
        for b, row, count in zip(slots, rows, counts.tolist(), strict=True):
            own_rows[b].copy_(row)
            self._frames[b] = count

    # Inside -----------------------------------------------------------------------------------------------------------

    def _check_codes(self, semantic: Tensor, acoustic: Tensor | None) -> tuple[Tensor, Tensor | None]:
        name = f"{self.name}.step"
        codes = check_codes(name, semantic, acoustic, self._stages)
        if semantic.shape[0] != self.batch_size:
            raise ValueError(f"{name}: semantic_codes must be [{self.batch_size}, 1, F], got {list(semantic.shape)}")
        return codes

    def _check_range(self, what: str, codes: Tensor, entries: int, slots: Sequence[int]) -> None:
        # One pass for all slots is checked by its lookup; here a later pass or another slot would have changed.
        lowest, highest = torch.aminmax(codes)
        if int(lowest) < 0 or int(highest) >= entries:
            n, stage, frame = ((codes < 0) | (codes >= entries)).nonzero()[0].tolist()
            raise ValueError(
                f"{self.name}.step: {what} must be in [0, {entries}), got {int(codes[n, stage, frame])} at slot"
                f" {slots[n]}, stage {stage}, frame {frame}"
            )

    def _result(self, out: Tensor | None, samples: int) -> Tensor:
        shape = (self.batch_size, 1, samples)
        if out is None:
            return torch.empty(shape, dtype=self._run.dtype, device=self._engine.device)
        if not isinstance(out, Tensor) or out.shape != shape or out.dtype != self._run.dtype:
            raise DualCodecError(f"{self.name}.step: out must be {list(shape)} {self._run.dtype}, got {got(out)}")
        return out

    def _pieces(
        self,
        slots: tuple[int, ...],
        semantic: Tensor | None,  # [n, 1, F]
        acoustic: Tensor | None,  # [n, q, F]
        frames: int,
        audio: Tensor,  # [B, 1, F * hop]
        lengths: Sequence[int] | None,  # of clips that have ended
    ) -> Tensor:
        """Run passes, and put each slot's samples one behind the other into audio, which is returned as far as used."""
        filled = [0] * self.batch_size
        ends = None if lengths is None else [totals(self._layers, n)[-1] for n in lengths]
        for at in range(0, frames, self.max_frames):
            count = min(self.max_frames, frames - at)
            samples, starts = count * self._hop, [self._frames[b] for b in slots]
            rows = self._run.run(
                slots,
                None if semantic is None else semantic[:, :, at : at + count],
                None if acoustic is None else acoustic[:, :, at : at + count],
                count,
                starts,
                lengths,
            )
            first = filled[0]
            together = len(slots) == self.batch_size and filled.count(first) == self.batch_size
            if ends is None and together and min(starts) * self._hop >= self._delay:
                audio[:, :, first : first + samples].copy_(rows)
                filled = [first + samples] * self.batch_size
            else:
                for i, b in enumerate(slots):
                    first = starts[i] * self._hop - self._delay
                    low, high = span_of(first, samples, None if ends is None else ends[i])
                    audio[b, :, filled[b] : filled[b] + high - low].copy_(rows[i, :, low:high])
                    filled[b] += high - low
            self._run.check()
            for b in slots:
                self._frames[b] += count
        self.sample_counts, most = filled, max(filled)
        idle = [b for b, count in enumerate(filled) if count == 0]
        if most and idle:  # in one call, so that idle slots cost next to nothing
            audio[idle, :, :most] = 0
        for b in slots:
            if 0 < filled[b] < most:
                audio[b, :, filled[b] : most].zero_()
        return audio[..., :most]
