"""Encode and decode on the CPU in time tiles: memory of fixed size whatever the length, and the bits of whole tensors.

A pass of a stage reads its weights once, so that stages with large weights take many rows at once, while those with
small ones take few: their rows then stay in cache from one kernel to the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .pipeline import Buffer, Inlet, Node, Output, Pass, Pipeline, Sink
from .stages import Scratch, Stage, UpsampleStage, stage_of
from .steps import Quantizer, Step

# Of idle workspaces, for each engine and kind of call. A 12hz_v1 decoder takes up to 59 MiB for clips of up to 128
# frames and 95 MiB for longer ones, its encoders 48 and 88.
KEPT_BYTES = 104 * 2**20


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


class SearchStage:
    """Frames [B, C, n] in; codes go to their place in `codes`, the chosen rows' sum out where it is wanted.

    With `subtract` the frames that are searched are those minus the ones that it holds, which it lets go.
    """

    granularity = 1

    def __init__(self, quantizer: Quantizer, quantized: bool) -> None:
        self.quantizer, self.quantized = quantizer, quantized
        self.in_channels = self.out_channels = quantizer.out_weight.shape[1]
        self.frames = 0
        self.codes: Tensor | None = None  # [B, q, F]
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
        assert self.codes is not None
        stop = o + x.shape[2]
        if self.subtract is not None:
            x = x - self.subtract.between(o, stop)
            self.subtract.first = stop
        lengths = within(self.lengths, o, stop)
        codes, chosen = self.quantizer.search(x, lengths, self.codes.shape[1], self.quantized)
        self.codes[:, :, o:stop] = codes
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
    """The encoders and their memory: `run` encodes a group of clips.

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

    def run(
        self,
        audio: Tensor | None,
        features: Tensor,
        semantic: Tensor,
        acoustic: Tensor | None,
        frame_lengths: Sequence[int] | None,
        sample_lengths: Sequence[int] | None,
    ) -> None:
        """Encode clips into codes that are there.

        Args:
            audio: [B, 1, S]; samples past S, and past a clip's own length, count as zeros.
            features: [B, semantic_dim, F].
            semantic: [B, 1, F] int64, written here.
            acoustic: [B, q, F] int64 or None, written here.
            frame_lengths: the clips' own frames, where they differ.
            sample_lengths: the clips' own samples, where they differ.
        """
        frames = features.shape[2]
        search = self._search
        search.frames, search.codes, search.lengths = frames, semantic, frame_lengths
        if audio is None or acoustic is None:
            self._semantic.start(Sink(self.batch), frame_lengths)
            self._feed_features(features, frames)
            return
        self._latent.restart(0, None)
        self._semantic.start(self._latent, frame_lengths)
        last = self._last
        last.frames, last.codes, last.lengths, last.subtract = frames, acoustic, frame_lengths, self._latent
        hop = self.programs.hop_samples
        whole = None if sample_lengths is None else [-(-n // hop) * hop for n in sample_lengths]
        self._acoustic.start(Sink(self.batch), whole)
        self._acoustic.inlet.lengths = sample_lengths
        padded = -(-audio.shape[2] // hop) * hop
        place: tuple[int, ...] = ()
        while not self._acoustic.nodes[-1].finished:
            heard = self._acoustic.inlet.end
            self._feed_features(features, min(frames, heard // hop + self._ahead))
            self._feed_audio(audio, padded)
            self._semantic.resume()
            self._acoustic.resume()
            reached = (self._semantic.inlet.end, heard, self._latent.end, self._acoustic.nodes[-1].emitted)
            assert reached != place, f"neither features nor audio can go on, at {place}"
            place = reached

    def _feed_features(self, features: Tensor, until: int) -> None:
        """Write features up to frame `until` as far as there is space."""
        inlet = self._semantic.inlet
        while (count := min(self._write_frames, inlet.space(), until - inlet.end)) > 0:
            inlet.target(count).copy_(features[:, :, inlet.end : inlet.end + count])
            self._semantic.write(count)
        if inlet.end == features.shape[2] and not inlet.closed:
            self._semantic.finish()

    def _feed_audio(self, audio: Tensor, padded: int) -> None:
        inlet = self._acoustic.inlet
        begin = inlet.end
        count = min(self._write_samples, inlet.space(), padded - begin)
        if count > 0:
            target = inlet.target(count)
            given = min(max(audio.shape[2] - begin, 0), count)
            target[:, :, :given].copy_(audio[:, :, begin : begin + given])
            target[:, :, given:].zero_()
            self._acoustic.write(count)
        if inlet.end == padded and not inlet.closed:
            self._acoustic.finish()


class _Workspace(Protocol):
    batch: int
    frames: int

    def bytes(self) -> int: ...


Workspace = TypeVar("Workspace", bound=_Workspace)


class Pool(Generic[Workspace]):
    """Idle workspaces. A call takes one or makes one, and gives it back: calls on several threads never share one.

    Args:
        make: (batch, frames) to a workspace.
        cap_bytes: memory of the idle ones; those given back longest ago go first.
    """

    def __init__(self, make: Callable[[int, int], Workspace], cap_bytes: int = KEPT_BYTES) -> None:
        self._make, self._cap_bytes = make, cap_bytes
        self._idle: list[Workspace] = []
        self._lock = threading.Lock()

    def held_bytes(self) -> int:
        return sum(workspace.bytes() for workspace in self._idle)

    def take(self, batch: int, frames: int) -> Workspace:
        frames = min(1 << (frames - 1).bit_length(), 1 << 14)  # a few sizes; past the last one tiles are full
        with self._lock:
            fits = [w for w in self._idle if w.batch == batch and w.frames >= frames]
            if fits:
                best = min(fits, key=lambda w: w.frames)
                self._idle.remove(best)
                return best
        return self._make(batch, frames)

    def give(self, workspace: Workspace) -> None:
        with self._lock:
            self._idle.append(workspace)
            while self._idle and self.held_bytes() > self._cap_bytes:
                self._idle.pop(0)


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
        pool = self._semantic if audio is None else self._encoders
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
                tiles.run(
                    heard,
                    features[group, :, :longest],
                    semantic[group, :, :longest],
                    None if acoustic is None else acoustic[group, :, :longest],
                    own,
                    samples,
                )
                pool.give(tiles)
        return semantic, acoustic
