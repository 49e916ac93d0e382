"""Streams' passes on a GPU: of fixed shape, for all slots, recorded once as a CUDA graph and replayed.

A pass computes every slot; what those that do not take part come to is not kept. Rows outside a slot's clip become
zeros by bounds that are an input, in a recording of its own: past their first frames streams need none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._stream_cpu import Chain, DecoderState
from ._stream_passes import EncoderState
from ._stream_plan import Layer
from .graphs import CudaRecorder, Recorder
from .stages import stage_of
from .steps import ConvNeXtStep, ConvStep, ResidualUnitStep, Step, UpsampleStep
from .tiles import Programs


def _conv(step: ConvStep, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.snake_conv1d(
        x,
        step.weight,
        step.bias,
        step.alpha,
        stride=step.stride,
        dilation=step.dilation,
        padding=(0, 0),
        activation=step.activation,
        residual=residual,
        packed=step.packed,
    )


def _rows_of(step: Step, x: Tensor, first: int, count: int) -> Tensor:
    """Return what a step makes of x without padding; of an upsampling `count` rows from its row `first` on."""
    if isinstance(step, ConvStep):
        return _conv(step, x)
    if isinstance(step, ResidualUnitStep):
        kernel = torch.ops.dualcodec_ext.residual_unit
        y: Tensor = kernel(x, *step.tensors, step.dilation, (0, 0), step.causal, None, step.packed, step.winograd)
        return y
    if isinstance(step, UpsampleStep):
        return step(x, None)[:, :, first : first + count]
    weight, bias, eps = step.norm
    assert isinstance(step, ConvNeXtStep)
    y = ops.causal_dwconv1d(x, step.weight, step.bias, padding=(0, 0), ln_weight=weight, ln_bias=bias, eps=eps)
    left = step.padding[0]
    return _conv(step.contract, _conv(step.expand, y), x[:, :, left : left + count])


@dataclass
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], Any]
    outputs: tuple[Tensor, ...]  # of the last replay


Inputs = dict[str, Tensor]


class Recorded:
    """Passes over `state`, the slots' rows, each kind of which is recorded when it first comes.

    Args:
        state: [B, numel], on the device.
        recorder: None: CUDA graphs on a GPU; elsewhere passes run as they are.
    """

    def __init__(self, state: Tensor, recorder: Recorder | None) -> None:
        self._rows, self.device, self.batch = state, state.device, state.shape[0]
        self._recorder = CudaRecorder() if recorder is None and self.device.type == "cuda" else recorder
        self._made: dict[tuple[object, ...], _Recording] = {}

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def take(
        self,
        key: tuple[object, ...],
        slots: tuple[int, ...],
        make: Callable[[], Inputs],
        run: Callable[[Inputs], tuple[Tensor, ...]],
    ) -> tuple[_Recording, Tensor]:
        """Return the recording of a pass with inputs `active` [B] bool set, and the slots' numbers on the device."""
        index = torch.tensor(slots, device=self.device)
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                inputs = {"active": self.zeros(self.batch, dtype=torch.bool)} | make()
                found = self._made[key] = self._record(inputs, run)
        found.inputs["active"].zero_().index_fill_(0, index, True)
        return found, index

    def _record(self, inputs: Inputs, run: Callable[[Inputs], tuple[Tensor, ...]]) -> _Recording:
        if self._recorder is None:
            made = _Recording(inputs, lambda: None, ())

            def again() -> None:
                made.outputs = run(inputs)

            made.replay = again
            return made
        before = self._rows.clone()  # a recording begins with a run
        replay, outputs, _ = self._recorder.record(lambda: run(inputs))
        self._rows.copy_(before)
        return _Recording(inputs, replay, outputs)


def behind(state: Tensor, offset: int, context: int, x: Tensor, kept: Tensor) -> Tensor:
    """Return x with its context in front, channels-last, and keep its last rows as the next one.

    Args:
        state: [B, numel]; from `offset` on it holds the context.
        context: rows.
        x: [B, C, T].
        kept: [B] bool, the slots whose context changes.
    """
    rows = x.transpose(1, 2)
    if not context:
        return rows.contiguous().transpose(1, 2)
    channels = x.shape[1]
    memory = state[:, offset : offset + context * channels].unflatten(1, (context, channels))
    whole = torch.cat([memory, rows], 1)
    memory.copy_(torch.where(kept[:, None, None], whole[:, -context:], memory))
    return whole.transpose(1, 2)


def through(chain: Chain, x: Tensor, frames: int, kept: Tensor, bounds: Sequence[Tensor] | None = None) -> Tensor:
    """Return what a chain makes of the rows x [B, C, frames * in_rows].

    Args:
        kept: [B] bool, the slots whose contexts change.
        bounds: per layer [B, 2] int64, which of its output rows lie in the slots' clips; None: all.
    """
    offset = 0
    for i, layer in enumerate(chain.layers):
        stage, count = stage_of(layer.step), frames * layer.out_rows
        whole = behind(chain.state, offset, layer.context, x, kept)
        offset += layer.context * chain.channels[i]
        if layer.missing:
            whole = torch.nn.functional.pad(whole.transpose(1, 2), (0, 0, 0, layer.missing)).transpose(1, 2)
        stop = stage.stop(count - 1 - layer.out_delay) - layer.first
        first = -layer.out_delay - layer.first * layer.out_rows // layer.in_rows
        x = _rows_of(layer.step, whole[:, :, :stop], first, count)
        if bounds is not None:
            row = torch.arange(count, device=x.device)
            inside = (row >= bounds[i][:, :1]) & (row < bounds[i][:, 1:])
            x = torch.where(inside[:, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x


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
        self._recorded = Recorded(self.state, recorder)

    def run(
        self,
        slots: tuple[int, ...],
        semantic: Tensor | None,
        acoustic: Tensor | None,
        frames: int,
        starts: Sequence[int],
        lengths: Sequence[int] | None,
    ) -> Tensor:
        """As `CpuDecoder.run`."""
        stages = None if semantic is None else 0 if acoustic is None else acoustic.shape[1]
        bounded = lengths is not None or self.before_the_first_sample(starts)
        recorded, device = self._recorded, self._recorded.device
        with recorded.on_device():
            made, index = recorded.take(
                (frames, stages, bounded),
                slots,
                partial(self._inputs, frames, stages, bounded),
                partial(self._pass, frames=frames),
            )
            for name, codes in (("semantic", semantic), ("acoustic", acoustic)):
                if codes is not None:
                    made.inputs[name].zero_().index_copy_(0, index, codes.to(device, torch.int64))
            if bounded:
                spans = self.spans(frames, starts, lengths)
                made.inputs["bounds"].index_copy_(1, index, torch.tensor(spans, device=device))
            made.replay()
            audio, fine = made.outputs
            if not bool(fine):
                assert semantic is not None
                self.programs.semantic_quantizer.lookup(semantic.to(device), None, None)
                if acoustic is not None:
                    self.programs.acoustic_quantizer.lookup(acoustic.to(device), None, None)
                raise AssertionError("a code was out of range, and then it was not")
        return audio if len(slots) == recorded.batch else audio[index]

    def _inputs(self, frames: int, stages: int | None, bounded: bool) -> Inputs:
        zeros, batch, inputs = self._recorded.zeros, self._recorded.batch, {}
        if stages is not None:
            inputs["semantic"] = zeros(batch, 1, frames)
        if stages:
            inputs["acoustic"] = zeros(batch, stages, frames)
        if bounded:
            layers = len(self._semantic.layers) + len(self._decoder.layers)
            inputs["bounds"] = zeros(layers, batch, 2)
        return inputs

    def _pass(self, inputs: Inputs, frames: int) -> tuple[Tensor, Tensor]:
        """Return the audio [B, 1, F * hop], and whether all codes were in range; else no state has changed."""
        quantizers = {"semantic": self.programs.semantic_quantizer, "acoustic": self.programs.acoustic_quantizer}
        batch, device = self._recorded.batch, self._recorded.device
        fine = torch.ones((), dtype=torch.bool, device=device)
        found: dict[str, Tensor] = {}
        for name, quantizer in quantizers.items():
            if name in inputs:
                codes, entries = inputs[name], quantizer.codebooks.shape[1]
                fine = fine & ((codes >= 0) & (codes < entries)).all()
                found[name] = quantizer.lookup(codes.clamp(0, entries - 1), None, None)
        kept = inputs["active"] & fine
        width = self._semantic.channels[0] if self._semantic.layers else self._latent
        nothing = torch.zeros(batch, frames, width, dtype=self.dtype, device=device).transpose(1, 2)
        bounds = list(inputs["bounds"]) if "bounds" in inputs else None
        before = len(self._semantic.layers)
        x = through(self._semantic, found.get("semantic", nothing), frames, kept, bounds)
        if self._late or "acoustic" in found:
            rows = found.get("acoustic")
            if rows is None:
                rows = torch.zeros(batch, self._latent, frames, dtype=self.dtype, device=device)
            if self._late:
                rows = behind(self._waiting, 0, self._late, rows, kept)
            x = x + rows[:, :, :frames]
        return through(self._decoder, x, frames, kept, None if bounds is None else bounds[before:]), fine


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
        self._recorded = Recorded(self.state, recorder)

    def run(
        self, slots: tuple[int, ...], features: Tensor, audio: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """As `CpuEncoder.run`."""
        recorded, given = self._recorded, {"features": features}
        if audio is not None:
            given["audio"] = audio
        with recorded.on_device():
            made, index = recorded.take(
                (frames, audio is not None),
                slots,
                lambda: {
                    what: recorded.zeros(recorded.batch, *x.shape[1:], dtype=self.programs.dtype)
                    for what, x in given.items()
                },
                partial(self._pass, frames=frames),
            )
            for what, x in given.items():
                made.inputs[what].index_copy_(0, index, x.to(recorded.device, self.programs.dtype))
            made.replay()
        codes = [c if len(slots) == recorded.batch else c[index] for c in made.outputs]
        return codes[0], codes[1] if len(codes) > 1 else None

    def _pass(self, inputs: Inputs, frames: int) -> tuple[Tensor, ...]:
        """Return the semantic codes [B, 1, F] and, of audio, the acoustic ones [B, q, F]."""
        programs, kept = self.programs, inputs["active"]
        x = through(self.chains[0], inputs["features"], frames, kept)
        codes, latent = programs.semantic_quantizer.search(x, None, return_quantized="audio" in inputs)
        if latent is None:
            return (codes,)
        if self.chains[1].layers:
            latent = through(self.chains[1], latent, frames, kept)
        z = through(self.chains[2], inputs["audio"], frames, kept)
        return codes, programs.acoustic_quantizer.search(z - latent, None, self.stages)[0]
