"""The inference program: a model's weights, folded and packed once, run on the ops.

Activations are channels-last from the first convolution to the last. Every step maps lengths as it maps samples, so
that a clip in a padded batch gives what it gives alone; all steps' lengths are worked out on the CPU before the first
one runs, and go to the device in one copy.

On the CPU whole clips run in tiles (`tiles.py`), with the bits of whole tensors; a GPU runs whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .forms import Form, form_for
from .pieces import decode_pieces, encode_pieces
from .reference.checks import naming_wrong_codes
from .stages import stage_of
from .steps import (
    ConvStep,
    Quantizer,
    ResidualUnitStep,
    Step,
    UpsampleStep,
    lengths_through,
    program,
    run,
    weight_dtype,
)
from .tiles import Programs, Sizes, Tiles


def _listed(lengths: Tensor | None) -> list[int] | None:
    return None if lengths is None else lengths.tolist()


# Units of 16 bits and up to so many channels are one kernel on a GPU, which snakes rows where it keeps them.
_FUSED_CHANNELS = 192


def _has_pass(unit: ResidualUnitStep) -> bool:
    """Whether a unit's first Snake is a pass of its own on a GPU."""
    return unit.packed.element_size() == 2 and unit.tensors[1].shape[0] > _FUSED_CHANNELS


def hand_snakes_on(steps: Sequence[Step]) -> list[Step]:
    """Return steps that give the same on a GPU, where rows go through the next layer's Snake as they are written:
    there it would be a pass of its own.

    A unit in front of a convolution or an upsampling writes them so alone. In front of a wide unit, which adds its
    input as it is, a wide unit or an upsampling writes both. The last convolution, to one channel, snakes what it
    reads, and so do narrow units and those in float32.
    """
    made = list(steps)
    for i, behind in enumerate(steps[1:]):
        step = made[i]
        if isinstance(behind, ResidualUnitStep):
            if isinstance(step, UpsampleStep) and _has_pass(behind):
                made[i] = replace(step, out_alpha=behind.tensors[0])
            elif isinstance(step, ResidualUnitStep) and _has_pass(step) and _has_pass(behind):
                made[i] = replace(step, out_alpha=behind.tensors[0], hands_both=True)
        elif (
            isinstance(step, ResidualUnitStep)
            and isinstance(behind, ConvStep | UpsampleStep)
            and behind.alpha is not None
            and (isinstance(behind, UpsampleStep) or behind.weight.shape[0] > 1)
        ):
            made[i] = replace(step, out_alpha=behind.alpha)
            made[i + 1] = replace(behind, alpha=None)
    return made


class Engine:
    """One model's packed weights, and encode and decode on them.

    Args:
        model: the parameters; they are copied, folded and packed here, and not looked at again.
        dtype: of the activations, float32, float64 (CPU alone), bfloat16 or float16.
        fast: as form="fast".
        form: of the decoder's residual units: "exact" (None) or "fast", which compute groups of steps, or "direct",
            which gives each step as soon as its inputs are there. All but float32 on the CPU is direct, and so is
            encode.

    Numerics: float32 accumulation (float64 for float64); codes are searched in float32 at least. A clip's result
        depends neither on the batch it is in nor on the number of threads.
    """

    def __init__(
        self, model: reference.DualCodec, dtype: torch.dtype, fast: bool = False, form: Form | None = None
    ) -> None:
        self.dtype = dtype
        self.device = next(model.parameters()).device
        weights = weight_dtype(dtype, self.device)
        self.form = form_for(form or ("fast" if fast else "exact"), dtype, self.device)
        with torch.no_grad():
            self._semantic_encoder = program(list(model.convnext_encoder), weights)
            self._semantic_decoder = program(list(model.convnext_decoder), weights)
            self._semantic_quantizer = Quantizer.of(model.semantic_vq, dtype)
            self._acoustic_encoder = program(list(model.dac.encoder.block), weights)
            self._acoustic_quantizer = Quantizer.of(model.dac.quantizer, dtype)
            self._decoder = program(list(model.dac.decoder.model), weights, self.form)
        # What whole tensors run through, with the same results.
        whole = hand_snakes_on if self.device.type == "cuda" else list
        self._whole_encoder, self._whole_decoder = whole(self._acoustic_encoder), whole(self._decoder)
        self._decode_semantic = model.decode_semantic_for_codec
        self.hop_samples = model.dac.hop_length
        self.semantic_entries = self._semantic_quantizer.codebooks.shape[1]
        self.acoustic_entries = self._acoustic_quantizer.codebooks.shape[1]
        self._samples: dict[int, int] = {}
        self.set_tiles(None)

    @property
    def _parts(self) -> tuple[object, ...]:
        programs = (self._semantic_encoder, self._semantic_decoder, self._acoustic_encoder, self._decoder)
        return (*programs, self._semantic_quantizer, self._acoustic_quantizer)

    def set_tiles(self, sizes: Sizes | None) -> None:
        """Set how large tiles are, None: the usual sizes. Results do not depend on it, time and memory do."""
        programs = Programs(
            self._semantic_encoder,
            self._semantic_quantizer,
            self._semantic_decoder if self._decode_semantic else [],
            self._acoustic_encoder,
            self._acoustic_quantizer,
            self._decoder,
            self.hop_samples,
            self.dtype,
        )
        self.tiles = Tiles(programs, sizes)

    def weight_bytes(self) -> int:
        """Return the memory of the packed weights, in bytes."""
        seen: dict[int, int] = {}

        def visit(value: object) -> None:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, list | tuple):
                for item in value:
                    visit(item)
            elif hasattr(value, "__dict__"):
                for item in vars(value).values():
                    visit(item)

        visit(self._parts)
        return sum(seen.values())

    def _channels_last(self, x: Tensor) -> Tensor:
        x = x.to(device=self.device, dtype=self.dtype)
        channels, steps = x.shape[1:]
        if channels == 1:  # same memory; only the stride tells the ops which layout to go on in
            return x.contiguous().as_strided(x.shape, (steps, 1, 1))
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def encode_lengths(self, frame_lengths: Tensor, sample_lengths: Tensor | None) -> Tensor:
        """Return the lengths [rows, B] that `encode` needs, on the CPU, from those of its inputs on the CPU."""
        rows = [frame_lengths, *lengths_through(self._semantic_encoder, frame_lengths)]
        if sample_lengths is not None:
            rows += lengths_through(self._semantic_decoder, frame_lengths)
            rows += lengths_through(self._acoustic_encoder, sample_lengths)
        return torch.stack(rows)

    def encode(
        self,
        audio: Tensor | None,
        semantic_repr: Tensor,
        num_quantizers: int | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn features, and audio where acoustic codes are wanted, into codes.

        Args:
            audio: [B, 1, S] with S a multiple of the hop; None: semantic codes alone.
            semantic_repr: [B, semantic_dim, F].
            num_quantizers: acoustic codebooks to use, None: all.
            lengths: `encode_lengths`, on this engine's device; None: none is shorter.

        Returns:
            Codes [B, 1, F] and [B, q, F] or None.
        """
        rows: list[Tensor] | None = None if lengths is None else list(lengths)
        frames = rows.pop(0) if rows else None

        def take(steps: Sequence[Step]) -> list[Tensor] | None:
            return None if rows is None else [rows.pop(0) for _ in steps]

        x = self._channels_last(semantic_repr)
        x = run(self._semantic_encoder, x, take(self._semantic_encoder))
        codes, latent = self._semantic_quantizer.search(x, frames, return_quantized=audio is not None)
        if audio is None or latent is None:
            return codes, None
        through = take(self._semantic_decoder)
        if self._decode_semantic:
            latent = run(self._semantic_decoder, latent, through)
        z = run(self._whole_encoder, self._channels_last(audio), take(self._whole_encoder))
        residual = z[..., : latent.shape[-1]] - latent
        return codes, self._acoustic_quantizer.search(residual, frames, num_quantizers)[0]

    def encode_clips(
        self,
        audio: Tensor | None,
        semantic_repr: Tensor,
        num_quantizers: int | None,
        frame_lengths: Tensor | None,
        sample_lengths: Tensor | None,
        chunk_frames: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode from the inputs' own lengths, in tiles on the CPU.

        Args:
            audio: [B, 1, S], S of any size: samples up to a whole frame, and those past a clip's length, count as 0;
                on a GPU the caller has put them there.
            semantic_repr, num_quantizers: as for `encode`.
            frame_lengths: [B] on the CPU; None: none is shorter.
            sample_lengths: [B] on the CPU or None, of the audio as it is given.
            chunk_frames: of the largest tile, on the CPU.

        Returns:
            As `encode`, the same bits.
        """
        if self.device.type != "cpu":
            rows = None if frame_lengths is None else self.encode_lengths(frame_lengths, sample_lengths)
            return self.encode(audio, semantic_repr, num_quantizers, None if rows is None else rows.to(self.device))
        stages = self._acoustic_quantizer.codebooks.shape[0] if num_quantizers is None else num_quantizers
        lengths = _listed(frame_lengths), _listed(sample_lengths)
        return self.tiles.encode(audio, semantic_repr, stages, *lengths, chunk_frames)

    def decode_clips(
        self,
        semantic_codes: Tensor,
        acoustic_codes: Tensor | None,
        frame_lengths: Tensor | None,
        chunk_frames: int | None = None,
    ) -> Tensor:
        """As `decode`, the same bits, from the clips' own frames [B] on the CPU; there in tiles of chunk_frames."""
        if self.device.type != "cpu":
            rows = None if frame_lengths is None else self.decode_lengths(frame_lengths)
            return self.decode(semantic_codes, acoustic_codes, None if rows is None else rows.to(self.device))
        semantic, acoustic = semantic_codes.cpu(), None if acoustic_codes is None else acoustic_codes.cpu()
        samples, entries = self.decoded_samples(semantic.shape[2]), (self.semantic_entries, self.acoustic_entries)
        # A tile knows a code's place within the tile alone.
        with naming_wrong_codes("Engine.decode_clips", semantic, acoustic, entries, frame_lengths):
            return self.tiles.decode(semantic, acoustic, _listed(frame_lengths), samples, chunk_frames)

    def decode_pieces(self, semantic: Tensor, acoustic: Tensor | None, chunk_frames: int) -> Iterator[Tensor]:
        """Yield what `decode` gives of codes on the CPU, of any integer type, chunk_frames frames at a time."""
        yield from decode_pieces(self.tiles, semantic.cpu(), None if acoustic is None else acoustic.cpu(), chunk_frames)

    def encode_pieces(
        self, pieces: Iterable[tuple[Tensor, Tensor]], num_quantizers: int | None, chunk_frames: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what `encode_clips` gives of audio and features on the CPU, as they come.

        Args:
            pieces: audio [B, 1, n] and features [B, semantic_dim, k], which joined are those of the clips.
            num_quantizers: acoustic codebooks to use, 0: semantic codes alone, None: all.
            chunk_frames: of the largest tile.
        """
        stages = self._acoustic_quantizer.codebooks.shape[0] if num_quantizers is None else num_quantizers
        yield from encode_pieces(self.tiles, pieces, stages, chunk_frames)

    def decoder_groups(self) -> list[int]:
        """Return how many rows each of the decoder's steps computes as one."""
        return [stage_of(step).granularity for step in self._decoder]

    def decode_lengths(self, frame_lengths: Tensor) -> Tensor:
        """Return the lengths [rows, B] that `decode` needs, on the CPU, from those of the codes on the CPU."""
        through = (lengths_through(steps, frame_lengths) for steps in (self._semantic_decoder, self._decoder))
        return torch.stack([frame_lengths, *(row for rows in through for row in rows)])

    def decoded_samples(self, frames: int) -> int:
        """Return the samples that decoding `frames` frames gives."""
        known = self._samples.get(frames)  # a dictionary: each step's lengths are tensors, slow to work out
        if known is None:
            lengths = torch.tensor([frames])
            for step in self._decoder:
                lengths = step.output_lengths(lengths)
            known = self._samples[frames] = int(lengths)
        return known

    def decode(self, semantic_codes: Tensor, acoustic_codes: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Turn codes into audio.

        Args:
            semantic_codes: [B, 1, F].
            acoustic_codes: [B, q, F] or None.
            lengths: `decode_lengths`, on this engine's device; None: none is shorter.

        Returns:
            Audio [B, 1, S'].
        """
        semantic_codes = semantic_codes.to(self.device)
        acoustic_codes = None if acoustic_codes is None else acoustic_codes.to(self.device)
        frames: Tensor | None = None
        semantic: list[Tensor] | None = None
        decoder: list[Tensor] | None = None
        if lengths is not None:
            frames, rows = lengths[0], list(lengths[1:])
            semantic, decoder = rows[: len(self._semantic_decoder)], rows[len(self._semantic_decoder) :]
        latent = self._semantic_quantizer.lookup(semantic_codes, frames, None)
        if self._decode_semantic:
            latent = run(self._semantic_decoder, latent, semantic)
        if acoustic_codes is not None:
            latent = self._acoustic_quantizer.lookup(acoustic_codes, frames, latent)
        return run(self._whole_decoder, latent, decoder)
