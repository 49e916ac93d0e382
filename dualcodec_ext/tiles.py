"""Encode and decode on the CPU in time tiles: memory of fixed size whatever the length, and the bits of whole tensors.

A pass of a stage reads its weights once, so that stages with large weights take many rows at once, while those with
small ones take few: their rows then stay in cache from one kernel to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._pool import KEPT_BYTES, Pool
from .pipeline import Buffer, Given, Inlet, Node, Output, Pass, Pipeline, Sink
from .stages import Scratch, Stage, UpsampleStage, stage_of
from .steps import Quantizer, Step

# Of a workspace where all weights are light. tiny's encoder took no longer over two minutes than with 2048 frames, in
# 20 MiB less; with 128 it took 3 to 11 % longer, in 7 MiB less (Zen 3, one thread).
_LIGHT_FRAMES = 256


@dataclass(frozen=True)
class Sizes:
    """How large tiles are; results do not depend on it.

    Args:
        pass_bytes: input and output rows of one pass, together over the batch.
        fewest_rows: of a pass all the same.
        group_frames: codec frames of the clips that run side by side: more clips run one group after the other.
        heavy_bytes: stages with weights past it take `heavy_passes` times as much, and wait for its part `gather`.
    """

    pass_bytes: int = 2 * 2**20
    fewest_rows: int = 256
    group_frames: int = 128
    heavy_bytes: int = 2**20
    heavy_passes: int = 2
    gather: float = 1.0

    def pass_of(self, stage: Stage, batch: int, itemsize: int, longest: int) -> Pass:
        """Return the pass of a stage that has at most `longest` output rows in all."""
        heavy = stage.weight_bytes() > self.heavy_bytes
        inputs = stage.in_channels // (stage.stride if isinstance(stage, UpsampleStage) else 1)
        rows = self.pass_bytes * (self.heavy_passes if heavy else 1) // ((inputs + stage.out_channels) * itemsize)
        most = max(1, min(longest, max(self.fewest_rows, rows) // batch))
        return Pass(most, max(1, int(self.gather * most)) if heavy else 1)


Keep = Callable[[Tensor, int], None]  # takes codes [B, q, n] and the frame that they begin at
_ENDLESS = 1 << 60  # frames of clips that have not ended


class SearchStage:
    """Frames [B, C, n] in; codes go to `keep`, the chosen rows' sum out where it is wanted.

    With `subtract` the frames that are searched are those minus the ones that it holds, which it lets go.
    """

    granularity = 1

    def __init__(self, quantizer: Quantizer, quantized: bool) -> None:
        self.quantizer, self.quantized = quantizer, quantized
        self.in_channels = self.out_channels = quantizer.out_weight.shape[1]
        self.stages = 1  # that are searched
        self.frames = 0
        self.keep: Keep | None = None
        self.lengths: Sequence[int] | None = None
        self.subtract: Buffer | None = None

    def first(self, o: int) -> int:
        return o

    def stop(self, o: int) -> int:
        return o + 1

    def computable(self, end: int) -> int:
        held = end if self.subtract is None else self.subtract.end
        return min(end, held, self.frames)

    def total(self, length: int) -> int:
        return min(length, self.frames) if self.frames else length

    def prepare(self, scratch: Scratch) -> None:
        return None

    def weight_bytes(self) -> int:
        return self.quantizer.packed.numel() * self.quantizer.packed.element_size()

    def run(self, x: Tensor, begin: int, out: Tensor, o: int) -> None:
        assert self.keep is not None
        stop = o + x.shape[2]
        if self.subtract is not None:
            x = x - self.subtract.between(o, stop)
            self.subtract.first = stop
        lengths = within(self.lengths, o, stop)
        codes, chosen = self.quantizer.search(x, lengths, self.stages, self.quantized)
        self.keep(codes, o)
        if chosen is not None:
            out.copy_(chosen)


class SearchNode(Node):
    """A SearchStage, which also waits for the frames that it subtracts."""

    stage: SearchStage

    def ready(self) -> int:
        held = self.stage.subtract
        return super().ready() if held is None else min(super().ready(), held.end - self.emitted)


def make_nodes(
    stages: Sequence[Stage], sizes: Sizes, batch: int, length: int, dtype: torch.dtype
) -> tuple[list[Node], int]:
    """Return the nodes, and the rows of one write into the first: one or more write brings `length` input rows."""
    nodes: list[Node] = []
    arrival = first = min(length, sizes.fewest_rows)
    for stage in stages:
        longest = max(1, stage.total(length))
        plan = sizes.pass_of(stage, batch, dtype.itemsize, longest)
        if not nodes:  # as many rows as the first stage takes at once
            arrival = first = max(1, min(length, plan.most * max(1, length // longest)))
        kind = SearchNode if isinstance(stage, SearchStage) else Node
        nodes.append(kind(stage, plan, batch, arrival, dtype))
        arrival, length = nodes[-1].plan.most, longest
    return nodes, first


def within(lengths: Sequence[int] | None, begin: int, end: int) -> Tensor | None:
    """Return how many of the steps from begin to end each clip has, [B] int64."""
    return None if lengths is None else torch.tensor([min(max(n - begin, 0), end - begin) for n in lengths])


def _into(codes: Tensor) -> Keep:
    """Return what puts codes to their place among those of whole clips, [B, q, F]."""

    def keep(found: Tensor, first: int) -> None:
        codes[:, :, first : first + found.shape[2]] = found

    return keep


@dataclass(frozen=True)
class Programs:
    """What an engine runs."""

    semantic_encoder: Sequence[Step]
    semantic_quantizer: Quantizer
    semantic_decoder: Sequence[Step]  # empty where the latent is added as it is
    acoustic_encoder: Sequence[Step]
    acoustic_quantizer: Quantizer
    decoder: Sequence[Step]
    hop_samples: int
    dtype: torch.dtype


class DecodeTiles:
    """A decoder and its memory: `start`, `write` codes, `finish`.

    Args:
        programs: of the engine.
        sizes: of the tiles.
        batch: clips side by side.
        frames: that it must take in one go without being slow; it takes any number.
    """

    def __init__(self, programs: Programs, sizes: Sizes, batch: int, frames: int) -> None:
        self.programs, self.batch, self.frames = programs, batch, frames
        stages = [stage_of(step) for step in [*programs.semantic_decoder, *programs.decoder]]
        nodes, self._write_frames = make_nodes(stages, sizes, batch, frames, programs.dtype)
        self.pipeline = Pipeline(nodes)

    def bytes(self) -> int:
        return self.pipeline.bytes()

    def start(self, outlet: Inlet, frame_lengths: Sequence[int] | None = None) -> None:
        """Begin new clips, whose samples go to `outlet`."""
        self._lengths = frame_lengths
        self.pipeline.start(outlet, frame_lengths)
        self.pipeline.nodes[len(self.programs.semantic_decoder)].arrived = self._add_acoustic

    def _add_acoustic(self, latent: Tensor, first: int) -> None:
        if self._acoustic is None:
            return
        end = first + latent.shape[2]
        codes = self._acoustic[:, :, first - self._from : end - self._from]
        quantizer = self.programs.acoustic_quantizer
        quantizer.lookup_into(latent, codes, within(self._lengths, first, end), latent)

    def write(self, semantic: Tensor, acoustic: Tensor | None, acoustic_from: int = 0) -> None:
        """Decode as many samples as the frames so far suffice for.

        Args:
            semantic: [B, 1, n], the next frames.
            acoustic: [B, q, m] or None; frame `acoustic_from` of the clips is its first. It must have every frame that
                the semantic decoder gives meanwhile: those of this call and, where that decoder looks ahead, some
                before.
            acoustic_from: see there.
        """
        self._acoustic, self._from = acoustic, acoustic_from
        pipeline, inlet, at = self.pipeline, self.pipeline.inlet, 0
        while at < semantic.shape[2]:
            count = min(self._write_frames, inlet.space(), semantic.shape[2] - at)
            assert count > 0, "the outlet has no space"
            lengths = within(self._lengths, inlet.end, inlet.end + count)
            codes = semantic[:, :, at : at + count]
            self.programs.semantic_quantizer.lookup_into(inlet.target(count), codes, lengths, None)
            pipeline.write(count)
            at += count

    def finish(self) -> None:
        """Decode the rest, with the last call's acoustic codes."""
        self.pipeline.finish()


class EncodeTiles:
    """The encoders and their memory: `start`, add to `features` and `audio` and `advance`, `finish`.

    Args:
        programs: of the engine.
        sizes: of the tiles.
        batch: clips side by side.
        frames: as for DecodeTiles.
        acoustic: whether there are acoustic codes.
    """

    def __init__(self, programs: Programs, sizes: Sizes, batch: int, frames: int, acoustic: bool) -> None:
        self.programs, self.batch, self.frames, self.acoustic = programs, batch, frames, acoustic
        self._ahead = sizes.fewest_rows  # frames of features before the audio's
        dtype = programs.dtype
        search = self._search = SearchStage(programs.semantic_quantizer, acoustic)
        before = [stage_of(step) for step in programs.semantic_encoder]
        behind = [stage_of(step) for step in programs.semantic_decoder] if acoustic else []
        nodes, self._write_frames = make_nodes([*before, search, *behind], sizes, batch, frames, dtype)
        self._semantic = Pipeline(nodes)
        if acoustic:
            last = self._last = SearchStage(programs.acoustic_quantizer, False)
            stages = [*(stage_of(step) for step in programs.acoustic_encoder), last]
            nodes, self._write_samples = make_nodes(stages, sizes, batch, frames * programs.hop_samples, dtype)
            self._acoustic = Pipeline(nodes)
            rows = min(frames, 4 * self._ahead)
            self._latent = Buffer(batch, rows + self._write_frames, last.in_channels, dtype)

    def bytes(self) -> int:
        if not self.acoustic:
            return self._semantic.bytes()
        return self._semantic.bytes() + self._acoustic.bytes() + self._latent.bytes()

    def start(
        self,
        stages: int,
        keep: tuple[Keep, Keep],
        frame_lengths: Sequence[int] | None = None,
        sample_lengths: Sequence[int] | None = None,
    ) -> None:
        """Begin new clips, whose `features` and `audio` come next.

        Args:
            stages: acoustic codebooks to search.
            keep: takes the semantic codes, and the acoustic ones.
            frame_lengths: the clips' own frames, where they differ.
            sample_lengths: the clips' own samples, where they differ.
        """
        self.features, self.audio = Given(), Given()
        search = self._search
        search.frames, search.keep, search.lengths = _ENDLESS, keep[0], frame_lengths
        if not self.acoustic:
            self._semantic.start(Sink(self.batch), frame_lengths)
            return
        self._latent.restart(0, None)
        self._semantic.start(self._latent, frame_lengths)
        last = self._last
        last.stages, last.subtract = stages, self._latent
        last.frames, last.keep, last.lengths = _ENDLESS, keep[1], frame_lengths
        hop = self.programs.hop_samples
        whole = None if sample_lengths is None else [-(-n // hop) * hop for n in sample_lengths]
        self._acoustic.start(Sink(self.batch), whole)
        self._acoustic.inlet.lengths = sample_lengths

    def advance(self) -> None:
        """Encode as many frames as what was given suffices for."""
        if not self.acoustic:
            self._feed_features(self.features.end)
            return
        place: tuple[int, ...] = ()
        while not self._acoustic.nodes[-1].finished:
            heard = self._acoustic.inlet.end
            self._feed_features(min(self.features.end, heard // self.programs.hop_samples + self._ahead))
            self._feed_audio()
            self._semantic.resume()
            self._acoustic.resume()
            reached = (self._semantic.inlet.end, heard, self._latent.end, self._acoustic.nodes[-1].emitted)
            if reached == place:
                return
            place = reached

    def finish(self) -> None:
        """End the clips, and encode the rest. Samples past the last one count as zeros."""
        self.features.closed = self.audio.closed = True
        self._search.frames = self.features.end
        if self.acoustic:
            self._last.frames = self.features.end
        self.advance()
        last = self._acoustic if self.acoustic else self._semantic
        assert last.nodes[-1].finished, f"neither features nor audio can go on, of {self.features.end} frames"

    def _feed_features(self, until: int) -> None:
        """Write features up to frame `until` as far as there is space."""
        inlet, features = self._semantic.inlet, self.features
        while (count := min(self._write_frames, inlet.space(), until - inlet.end)) > 0:
            features.take(inlet.end, inlet.target(count))
            self._semantic.write(count)
        if features.closed and inlet.end == features.end and not inlet.closed:
            self._semantic.finish()

    def _feed_audio(self) -> None:
        inlet, audio = self._acoustic.inlet, self.audio
        hop = self.programs.hop_samples
        end = -(-audio.end // hop) * hop if audio.closed else audio.end
        count = min(self._write_samples, inlet.space(), end - inlet.end)
        if count > 0:
            audio.take(inlet.end, inlet.target(count))
            self._acoustic.write(count)
        if audio.closed and inlet.end == end and not inlet.closed:
            self._acoustic.finish()


class Tiles:
    """Encode and decode of whole clips in tiles, on the CPU.

    Args:
        programs: of the engine.
        sizes: of the tiles.
    """

    def __init__(self, programs: Programs, sizes: Sizes | None = None) -> None:
        self.programs, self.sizes = programs, sizes or Sizes()
        # 10 s took encoders 4 to 5 % less time in passes of 3 MiB than of 2 for 12hz_v1, 1 % less for 25hz_v1 (Zen 4).
        heard = (programs, sizes or Sizes(pass_bytes=3 * 2**20, heavy_passes=1, gather=0.5))
        self.decoders = Pool(lambda batch, frames: DecodeTiles(programs, self.sizes, batch, frames))
        self._semantic = Pool(lambda batch, frames: EncodeTiles(*heard, batch, frames, False), KEPT_BYTES // 4)
        self._encoders = Pool(lambda batch, frames: EncodeTiles(*heard, batch, frames, True))

    def encoders(self, acoustic: bool) -> Pool[EncodeTiles]:
        """Return the workspaces of encoders, for acoustic codes too or for semantic ones alone."""
        return self._encoders if acoustic else self._semantic

    def piece_frames(self, chunk: int) -> int:
        """Return the frames of a workspace that clips go through piece by piece: `chunk`, or fewer where weights are
        so light that few rows are worth reading them."""
        programs = self.programs
        steps = [*programs.semantic_encoder, *programs.semantic_decoder, *programs.acoustic_encoder, *programs.decoder]
        heavy = max(stage_of(step).weight_bytes() for step in steps) > self.sizes.heavy_bytes
        return chunk if heavy else min(chunk, _LIGHT_FRAMES)

    def held_bytes(self) -> int:
        """Return the memory of the idle workspaces."""
        return sum(pool.held_bytes() for pool in (self.decoders, self._semantic, self._encoders))

    def _groups(self, batch: int, frames: int) -> list[slice]:
        """Return the clips that run side by side: one, or as many as fill a tile."""
        size = max(1, min(batch, self.sizes.group_frames // max(1, frames)))
        return [slice(at, min(at + size, batch)) for at in range(0, batch, size)]

    def decode(
        self,
        semantic: Tensor,
        acoustic: Tensor | None,
        frame_lengths: Sequence[int] | None,
        samples: int,
        chunk: int | None = None,
    ) -> Tensor:
        """As `Engine.decode`; samples: of the result, S'; chunk: frames that are looked up at once."""
        batch, _, frames = semantic.shape
        audio = torch.empty(batch, 1, samples, dtype=self.programs.dtype)
        for group in self._groups(batch, frames):
            lengths = None if frame_lengths is None else list(frame_lengths[group])
            longest = frames if lengths is None else max(lengths)
            if lengths is not None and min(lengths) == longest:
                lengths = None
            self._decode_group(
                semantic[group, :, :longest],
                None if acoustic is None else acoustic[group, :, :longest],
                lengths,
                audio[group],
                chunk or longest,
            )
        return audio

    def _decode_group(
        self, semantic: Tensor, acoustic: Tensor | None, lengths: Sequence[int] | None, audio: Tensor, chunk: int
    ) -> None:
        batch, _, frames = semantic.shape
        filled = 0
        if frames:
            tiles = self.decoders.take(batch, min(frames, chunk))
            outlet = Output(audio)
            tiles.start(outlet, lengths)
            for at in range(0, frames, chunk):
                tiles.write(semantic[:, :, at : at + chunk], acoustic)
            tiles.finish()
            filled = outlet.end
            self.decoders.give(tiles)
        audio[:, :, filled:].zero_()

    def encode(
        self,
        audio: Tensor | None,
        features: Tensor,
        num_quantizers: int,
        frame_lengths: Sequence[int] | None,
        sample_lengths: Sequence[int] | None,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Engine.encode`; audio [B, 1, S] of any S, samples past it are zeros; chunk: frames of a full tile."""
        batch, _, frames = features.shape
        semantic = torch.zeros(batch, 1, frames, dtype=torch.int64)
        acoustic = None if audio is None else torch.zeros(batch, num_quantizers, frames, dtype=torch.int64)
        pool = self.encoders(audio is not None)
        for group in self._groups(batch, frames):
            own = None if frame_lengths is None else list(frame_lengths[group])
            samples = None if sample_lengths is None else list(sample_lengths[group])
            longest = frames if own is None else max(own)
            heard = None if audio is None else audio[group]
            if own is not None and len(own) == 1:
                heard = None if heard is None or samples is None else heard[:, :, : samples[0]]
                own = samples = None
            if longest:
                tiles = pool.take(group.stop - group.start, min(longest, chunk or longest))
                keep = _into(semantic[group]), _into(semantic if acoustic is None else acoustic[group])
                tiles.start(num_quantizers, keep, own, samples)
                tiles.features.add(features[group, :, :longest])
                if heard is not None:
                    tiles.audio.add(heard)
                tiles.finish()
                pool.give(tiles)
        return semantic, acoustic
