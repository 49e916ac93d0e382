"""Streams' passes on a GPU: of fixed shape, for all slots, recorded once as a CUDA graph and replayed.

A pass computes every slot; what those that do not take part come to is not kept. Rows outside a slot's clip become
zeros by bounds that are an input, in a recording of its own: past their first frames streams need none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._code_look import Again, CodeInput, CodeLook, again_of, shapes_of
from ._stream_cpu import DecoderState
from ._stream_passes import EncoderState
from ._stream_plan import Layer
from ._stream_rows import GraphChain, Inlet, Rows, inlets_of, signal
from .graphs import CudaRecorder, Recorder
from .steps import Quantizer
from .tiles import Programs

Inputs = dict[str, Tensor]
_INDICES = 256  # kept, of some of the slots each


@dataclass
class _Recording:
    inputs: Inputs
    replay: Callable[[], Any]
    outputs: tuple[Tensor, ...]  # of the last replay
    slots: tuple[int, ...] = ()  # that inputs["active"] names
    recorded: bool = False  # replays fill the same outputs


class Recorded:
    """Passes over `state`, the slots' rows, each kind of which is recorded when it first comes.

    Args:
        state: [B, numel], on the device.
        inlets: of the layers, in a pass of so many frames.
        recorder: None: CUDA graphs on a GPU; elsewhere passes run as they are.
    """

    def __init__(self, state: Tensor, inlets: Callable[[int], list[Inlet]], recorder: Recorder | None) -> None:
        self._state, self.device, self.batch = state, state.device, state.shape[0]
        self._inlets = inlets
        self._recorder = CudaRecorder() if recorder is None and self.device.type == "cuda" else recorder
        self._made: dict[tuple[object, ...], _Recording] = {}
        self._rows: dict[int, Rows] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type != "cuda" or self.device.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def rows(self, frames: int) -> Rows:
        """Return the rows that all passes of so many frames share."""
        if frames not in self._rows:
            self._rows[frames] = Rows(self._state, self._inlets(frames))
        return self._rows[frames]

    def bytes(self) -> int:
        return sum(rows.bytes() for rows in self._rows.values())

    def index(self, slots: tuple[int, ...]) -> Tensor | None:
        """Return the slots' numbers on the device; None: all slots."""
        if len(slots) == self.batch:
            return None
        if slots not in self._indices:
            if len(self._indices) == _INDICES:
                self._indices.clear()
            self._indices[slots] = torch.tensor(slots, device=self.device)
        return self._indices[slots]

    def take(
        self,
        key: tuple[object, ...],
        slots: tuple[int, ...],
        make: Callable[[], Inputs],
        run: Callable[[Inputs], tuple[Tensor, ...]],
    ) -> _Recording:
        """Return the recording of a pass, its inputs `active` [B] bool and `error` [1] int64 beside those made."""
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                inputs = {"active": self.zeros(self.batch, dtype=torch.bool), "error": self.zeros(1)} | make()
                found = self._made[key] = self._record(inputs, run)
        if found.slots != slots:
            index = self.index(slots)
            if index is None:
                found.inputs["active"].fill_(True)
            else:
                found.inputs["active"].zero_().index_fill_(0, index, True)
            found.slots = slots
        return found

    def fill(self, to: Tensor, rows: Tensor, slots: tuple[int, ...], dim: int = 0) -> None:
        """Write rows of slots, of any device and dtype; those of others stay what they are."""
        index = self.index(slots)
        if index is None:
            to.copy_(rows)
        else:
            to.index_copy_(dim, index, rows.to(to.device, to.dtype))

    def of(self, made: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Return the rows of slots."""
        index = self.index(slots)
        return made if index is None else made[index]

    def _record(self, inputs: Inputs, run: Callable[[Inputs], tuple[Tensor, ...]]) -> _Recording:
        if self._recorder is None:
            made = _Recording(inputs, lambda: None, ())

            def again() -> None:
                made.outputs = run(inputs)

            made.replay = again
            return made
        before = self._state.clone()  # a recording begins with a run
        replay, outputs, _ = self._recorder.record(lambda: run(inputs))
        self._state.copy_(before)
        return _Recording(inputs, replay, outputs, recorded=True)


class GraphDecoder(DecoderState):
    """As `CpuDecoder`, on the device of the weights.

    Args:
        programs, semantic, decoder, batch, device: as for DecoderState.
        recorder: as for Recorded.
    """

    def __init__(
        self,
        programs: Programs,
        semantic: Sequence[Layer],
        decoder: Sequence[Layer],
        batch: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(programs, semantic, decoder, batch, device)
        self._chains = GraphChain(self._semantic), GraphChain(self._decoder)
        self._recorded = Recorded(self.state, self._inlets, recorder)
        self._quantizers: dict[str, Quantizer] = {
            "semantic": programs.semantic_quantizer,
            "acoustic": programs.acoustic_quantizer,
        }
        self._look: CodeLook | None = None
        self._looked_at: tuple[_Recording, dict[str, Tensor]] | None = None  # by the last pass
        self._again: dict[Any, tuple[_Recording, Again]] = {}  # of all slots, by the shapes of their codes

    def bytes(self) -> int:
        return super().bytes() + self._recorded.bytes()

    def run(
        self,
        slots: tuple[int, ...],
        semantic: Tensor | None,
        acoustic: Tensor | None,
        frames: int,
        starts: Sequence[int],
        lengths: Sequence[int] | None,
    ) -> Tensor:
        """As `CpuDecoder.run`; `check` comes behind it."""
        stages = None if semantic is None else 0 if acoustic is None else acoustic.shape[1]
        bounded = lengths is not None or self.before_the_first_sample(starts)
        recorded = self._recorded
        with recorded.on_device():
            made = recorded.take(
                (frames, stages, bounded),
                slots,
                partial(self._inputs, frames, stages, bounded),
                partial(self._pass, frames=frames),
            )
            given = {"semantic": semantic, "acoustic": acoustic}
            self._bring(made, {name: codes for name, codes in given.items() if codes is not None}, slots)
            if bounded:
                spans = torch.tensor(self.spans(frames, starts, lengths))
                recorded.fill(made.inputs["bounds"], spans, slots, 1)
            made.replay()
            if made.recorded and not bounded and semantic is not None and len(slots) == recorded.batch:
                self._keep(made, semantic, acoustic)
            return recorded.of(made.outputs[0], slots)

    def run_again(self, semantic: Tensor, acoustic: Tensor | None, out: Tensor | None) -> Tensor | None:
        """As `run` and `check` for all slots, past their first frames, and codes as they were given: those of a shape
        and type that have a recording start it before anything else is looked at.

        Args:
            semantic, acoustic: as they were given.
            out: as it was given: what the audio is written to, or None.

        Returns:
            The audio, a tensor of its own or `out`; None where there is no such recording, or a code is out of range,
            and then no state has changed.
        """
        made, again = self._again.get(shapes_of(semantic, acoustic), (None, None))
        if made is None or again is None or len(made.slots) < self._recorded.batch or self._look is None:
            return None
        if out is not None and not (
            isinstance(out, Tensor) and (out.shape, out.dtype) == (made.outputs[0].shape, made.outputs[0].dtype)
        ):
            return None
        audio = again.start(self._look, semantic, acoustic, out)
        return audio if audio is not None and self._look.fine() else None

    def _keep(self, made: _Recording, semantic: Tensor, acoustic: Tensor | None) -> None:
        shape = shapes_of(semantic, acoustic)
        if shape in self._again:
            return
        inputs = self._code_inputs(made, ["semantic"] if acoustic is None else ["semantic", "acoustic"])
        audio = made.outputs[0]  # [B, 1, S], of whatever strides its one channel has
        again = again_of(made.replay, inputs, audio.as_strided(audio.shape, (audio.stride(0), audio.shape[2], 1)))
        if again is not None:
            self._again[shape] = made, again

    def _code_inputs(self, made: _Recording, names: Iterable[str]) -> list[CodeInput]:
        return [CodeInput(made.inputs[name], self._quantizers[name].codebooks.shape[1]) for name in names]

    def _bring(self, made: _Recording, given: dict[str, Tensor], slots: tuple[int, ...]) -> None:
        """Bring codes to where the pass reads them; `check` looks at those of all slots, others are in range."""
        self._looked_at = None
        if len(slots) < self._recorded.batch:
            for name, codes in given.items():
                self._recorded.fill(made.inputs[name], codes, slots)
        elif given:
            if self._look is None:
                self._look = CodeLook(self._recorded.device)
            self._look.take(self._code_inputs(made, given), list(given.values()))
            self._looked_at = made, given

    def check(self) -> None:
        """Raise where the last pass had a code out of range, which has changed no state; does not wait for the pass.

        Apart from `run`, so that what else the pass is to be followed by is on its way before.
        """
        if self._looked_at is None or self._look is None:
            return
        (made, given), self._looked_at = self._looked_at, None
        if self._look.fine():
            return
        for name, codes in given.items():
            made.inputs[name].zero_()  # in a later pass the slots may not take part
            self._quantizers[name].lookup(codes.to(self._recorded.device), None, None)
        raise AssertionError("a code was out of range, and then it was not")

    def _inlets(self, frames: int) -> list[Inlet]:
        """Return those of the semantic decoder, the decoder, and the acoustic rows that wait for semantic ones."""
        found = [*inlets_of(self._semantic, frames), *inlets_of(self._decoder, frames)]
        if self._late:
            found.append(Inlet(int(self._waiting.storage_offset()), self._late, frames, 0, self._latent))
        return found

    def _inputs(self, frames: int, stages: int | None, bounded: bool) -> Inputs:
        zeros, batch, inputs = self._recorded.zeros, self._recorded.batch, {}
        self._recorded.rows(frames)  # memory that is no recording's own
        if stages is not None:
            inputs["semantic"] = zeros(batch, 1, frames)
        if stages:
            inputs["acoustic"] = zeros(batch, stages, frames)
        if bounded:
            layers = len(self._semantic.layers) + len(self._decoder.layers)
            inputs["bounds"] = zeros(layers, batch, 2)
        return inputs

    def _pass(self, inputs: Inputs, frames: int) -> tuple[Tensor]:
        """Return the audio [B, 1, F * hop]; of a code out of range no state has changed."""
        rows, error, programs = self._recorded.rows(frames), inputs["error"], self.programs
        before, layers = len(self._semantic.layers), self._decoder.layers
        bounds = list(inputs["bounds"]) if "bounds" in inputs else None
        inlet, latent = rows.fresh(0), rows.fresh(before)
        rows.bring(error)
        if "semantic" in inputs:
            programs.semantic_quantizer.lookup_into(inlet, inputs["semantic"], None, None, error)
        else:
            inlet.zero_()
        self._chains[0].through(rows, 0, frames, latent, bounds)
        acoustic = inputs.get("acoustic")
        if self._late:
            at = before + len(layers)
            if acoustic is None:
                rows.fresh(at).zero_()
            else:
                programs.acoustic_quantizer.lookup_into(rows.fresh(at), acoustic, None, None, error)
            latent.add_(rows.whole(at)[:, :, :frames])
        elif acoustic is not None:
            programs.acoustic_quantizer.lookup_into(latent, acoustic, None, latent, error)
        audio = signal(self.state, 1, frames * layers[-1].out_rows)
        self._chains[1].through(rows, before, frames, audio, None if bounds is None else bounds[before:])
        rows.take(inputs["active"], error)
        return (audio,)


class GraphEncoder(EncoderState):
    """As `CpuEncoder`, on the device of the weights.

    Args:
        name, programs, batch, stages, device: as for EncoderState.
        recorder: as for Recorded.
    """

    def __init__(
        self,
        name: str,
        programs: Programs,
        batch: int,
        stages: int,
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(name, programs, batch, stages, device)
        self._graph_chains = [GraphChain(chain) for chain in self.chains]
        self._firsts = [sum(len(chain.layers) for chain in self.chains[:i]) for i in range(len(self.chains))]
        self._recorded = Recorded(
            self.state, lambda frames: [x for chain in self.chains for x in inlets_of(chain, frames)], recorder
        )

    def run(
        self, slots: tuple[int, ...], features: Tensor, audio: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """As `CpuEncoder.run`."""
        recorded, given = self._recorded, {"features": features}
        if audio is not None:
            given["audio"] = audio
        with recorded.on_device():
            made = recorded.take(
                (frames, audio is not None),
                slots,
                partial(self._inputs, frames, audio is not None),
                partial(self._pass, frames=frames),
            )
            for what, x in given.items():
                recorded.fill(made.inputs[what], x, slots)
            made.replay()
        codes = [recorded.of(c, slots) for c in made.outputs]
        return codes[0], codes[1] if len(codes) > 1 else None

    def _inputs(self, frames: int, with_audio: bool) -> Inputs:
        """Return the rows that the first layers read: what is given is written there."""
        rows = self._recorded.rows(frames)
        inputs = {"features": rows.fresh(0)}
        return inputs | ({"audio": rows.fresh(self._firsts[2])} if with_audio else {})

    def _through(self, i: int, rows: Rows, frames: int, channels: int) -> Tensor:
        chain = self._graph_chains[i]
        y = signal(self.state, channels, frames * chain.chain.layers[-1].out_rows)
        chain.through(rows, self._firsts[i], frames, y)
        return y

    def _pass(self, inputs: Inputs, frames: int) -> tuple[Tensor, ...]:
        """Return the semantic codes [B, 1, F] and, of audio, the acoustic ones [B, q, F]."""
        programs, rows = self.programs, self._recorded.rows(frames)
        rows.bring(inputs["error"])
        x = self._through(0, rows, frames, programs.semantic_quantizer.out_weight.shape[1])
        with_audio = "audio" in inputs
        codes, latent = programs.semantic_quantizer.search(x, None, return_quantized=with_audio)
        made: tuple[Tensor, ...] = (codes,)
        if latent is not None:
            channels = programs.acoustic_quantizer.out_weight.shape[1]
            if self.chains[1].layers:
                rows.fresh(self._firsts[1]).copy_(latent)
                latent = self._through(1, rows, frames, channels)
            z = self._through(2, rows, frames, channels)
            made = codes, programs.acoustic_quantizer.search(z - latent, None, self.stages)[0]
        rows.take(inputs["active"], inputs["error"])
        return made
