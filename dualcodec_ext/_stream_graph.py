"""A stream's passes on a GPU: of fixed shape, for all slots, recorded once as a CUDA graph and replayed.

A pass computes every slot; what those that do not take part come to is not kept. Rows outside a slot's clip become
zeros by bounds that are an input, in a recording of its own: past their first frames streams need none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._stream_cpu import Chain, DecoderState
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
    audio: Tensor
    fine: Tensor  # [] bool: every code lay in its codebook


class GraphDecoder(DecoderState):
    """As `CpuDecoder`, on the device of the weights.

    Args:
        programs, semantic, decoder, batch, device: as for DecoderState.
        recorder: None: CUDA graphs on a GPU; elsewhere passes run as they are.
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
        self.device, self.batch = device, batch
        self._recorder = CudaRecorder() if recorder is None and device.type == "cuda" else recorder
        self._made: dict[tuple[int, int | None, bool], _Recording] = {}

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
        index = torch.tensor(slots, device=self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            made = self._recording(frames, stages, bounded)
            made.inputs["active"].zero_().index_fill_(0, index, True)
            for name, codes in (("semantic", semantic), ("acoustic", acoustic)):
                if codes is not None:
                    made.inputs[name].zero_().index_copy_(0, index, codes.to(self.device, torch.int64))
            if bounded:
                spans = self.spans(frames, starts, lengths)
                made.inputs["bounds"].index_copy_(1, index, torch.tensor(spans, device=self.device))
            made.replay()
            if not bool(made.fine):
                assert semantic is not None
                self.programs.semantic_quantizer.lookup(semantic.to(self.device), None, None)
                if acoustic is not None:
                    self.programs.acoustic_quantizer.lookup(acoustic.to(self.device), None, None)
                raise AssertionError("a code was out of range, and then it was not")
        return made.audio if len(slots) == self.batch else made.audio[index]

    def _recording(self, frames: int, stages: int | None, bounded: bool) -> _Recording:
        key = (frames, stages, bounded)
        found = self._made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._made[key] = self._record(frames, stages, bounded)
        return found

    def _record(self, frames: int, stages: int | None, bounded: bool) -> _Recording:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        inputs = {"active": zeros(self.batch, dtype=torch.bool)}
        if stages is not None:
            inputs["semantic"] = zeros(self.batch, 1, frames)
        if stages:
            inputs["acoustic"] = zeros(self.batch, stages, frames)
        if bounded:
            layers = len(self._semantic.layers) + len(self._decoder.layers)
            inputs["bounds"] = zeros(layers, self.batch, 2)

        def run() -> tuple[Tensor, ...]:
            return self._pass(inputs, frames)

        if self._recorder is None:
            results = [zeros(self.batch, 1, 0, dtype=self.dtype), zeros(dtype=torch.bool)]
            made = _Recording(inputs, lambda: None, results[0], results[1])

            def again() -> None:
                made.audio, made.fine = run()

            made.replay = again
            return made
        before = self.state.clone()  # a recording begins with a run
        replay, (audio, fine), _ = self._recorder.record(run)
        self.state.copy_(before)
        return _Recording(inputs, replay, audio, fine)

    def _pass(self, inputs: dict[str, Tensor], frames: int) -> tuple[Tensor, Tensor]:
        """Return the audio [B, 1, F * hop], and whether all codes were in range; else no state has changed."""
        quantizers = {"semantic": self.programs.semantic_quantizer, "acoustic": self.programs.acoustic_quantizer}
        fine = torch.ones((), dtype=torch.bool, device=self.device)
        found: dict[str, Tensor] = {}
        for name, quantizer in quantizers.items():
            if name in inputs:
                codes, entries = inputs[name], quantizer.codebooks.shape[1]
                fine = fine & ((codes >= 0) & (codes < entries)).all()
                found[name] = quantizer.lookup(codes.clamp(0, entries - 1), None, None)
        kept = inputs["active"] & fine
        width = self._semantic.channels[0] if self._semantic.layers else self._latent
        nothing = torch.zeros(self.batch, frames, width, dtype=self.dtype, device=self.device).transpose(1, 2)
        bounds = list(inputs["bounds"]) if "bounds" in inputs else None
        before = len(self._semantic.layers)
        x = self._through(self._semantic, found.get("semantic", nothing), frames, kept, bounds)
        if self._late or "acoustic" in found:
            rows = found.get("acoustic")
            if rows is None:
                rows = torch.zeros(self.batch, self._latent, frames, dtype=self.dtype, device=self.device)
            if self._late:
                rows = self._behind(self._waiting, 0, self._late, rows, kept)
            x = x + rows[:, :, :frames]
        return self._through(self._decoder, x, frames, kept, None if bounds is None else bounds[before:]), fine

    def _behind(self, state: Tensor, offset: int, context: int, x: Tensor, kept: Tensor) -> Tensor:
        """Return x with its context in front, channels-last, and keep its last rows as the next one."""
        rows = x.transpose(1, 2)
        if not context:
            return rows.contiguous().transpose(1, 2)
        channels = x.shape[1]
        memory = state[:, offset : offset + context * channels].unflatten(1, (context, channels))
        whole = torch.cat([memory, rows], 1)
        memory.copy_(torch.where(kept[:, None, None], whole[:, -context:], memory))
        return whole.transpose(1, 2)

    def _through(self, chain: Chain, x: Tensor, frames: int, kept: Tensor, bounds: Sequence[Tensor] | None) -> Tensor:
        offset = 0
        for i, layer in enumerate(chain.layers):
            stage, count = stage_of(layer.step), frames * layer.out_rows
            whole = self._behind(chain.state, offset, layer.context, x, kept)
            offset += layer.context * chain.channels[i]
            if layer.missing:
                whole = torch.nn.functional.pad(whole.transpose(1, 2), (0, 0, 0, layer.missing)).transpose(1, 2)
            stop = stage.stop(count - 1 - layer.out_delay) - layer.first
            first = -layer.out_delay - layer.first * layer.out_rows // layer.in_rows
            x = _rows_of(layer.step, whole[:, :, :stop], first, count)
            if bounds is not None:
                row = torch.arange(count, device=self.device)
                inside = (row >= bounds[i][:, :1]) & (row < bounds[i][:, 1:])
                x = torch.where(inside[:, None], x, torch.zeros((), dtype=x.dtype, device=self.device))
        return x
