"""Passes of a stream's encoder: features and audio of a few frames to codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._stream_cpu import Chain, Kept, Memory, Program, new_program
from ._stream_plan import Layer, make_layers
from .errors import DualCodecError
from .steps import Step
from .tiles import Programs


def _causal(name: str, steps: Sequence[Step], in_rows: int) -> list[Layer]:
    layers = make_layers(steps, in_rows)
    if layers and layers[-1].out_delay:
        raise DualCodecError(
            f"{name}: the model must have causal_encoder=True and is_causal=True, its encoders look"
            f" {layers[-1].out_delay} frames ahead"
        )
    return layers


class EncoderState:
    """What the slots of an encoder keep between passes, one row each: zeros are a clip's beginning.

    Args:
        name: of what raises.
        programs: of the engine.
        batch: slots.
        stages: acoustic codebooks; with 0 the semantic encoder alone runs.
        device: of the weights.

    Raises:
        DualCodecError: an encoder looks ahead.
    """

    def __init__(
        self, name: str, programs: Programs, batch: int, stages: int, device: torch.device | None = None
    ) -> None:
        self.programs, self.stages, self.hop = programs, stages, programs.hop_samples
        plans = [_causal(name, programs.semantic_encoder, 1)]
        if stages:
            plans += [
                _causal(name, programs.semantic_decoder, 1),
                _causal(name, programs.acoustic_encoder, programs.hop_samples),
            ]
        sizes = [Chain.state_numel(plan) for plan in plans]
        with torch.inference_mode(False):
            self.state = torch.zeros(batch, sum(sizes), dtype=programs.dtype, device=device)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.chains = [
            Chain(plan, self.state[:, end - size : end]) for plan, size, end in zip(plans, sizes, ends, strict=True)
        ]


class CpuEncoder(EncoderState):
    """Encodes a few frames for some of the slots.

    Args:
        name, programs, batch, stages: as for EncoderState.
        max_frames: of a pass.
    """

    def __init__(self, name: str, programs: Programs, batch: int, max_frames: int, stages: int) -> None:
        super().__init__(name, programs, batch, stages)
        widest = max(chain.numel(batch, max_frames) for chain in self.chains)
        channels = max(programs.semantic_quantizer.out_weight.shape[1], programs.acoustic_quantizer.out_weight.shape[1])
        rows = batch * max_frames * channels
        self._memory = Memory(programs.dtype, (widest, widest, rows, rows))
        self._made: Kept[tuple[Tensor, Program]] = Kept()

    def _through(self, i: int, slots: tuple[int, ...], frames: int, x: Tensor, place: int, channels: int) -> Tensor:
        """Run x through chain i, to rows [n, channels, frames] at a place."""
        chain, n = self.chains[i], len(slots)
        outlet = self._memory.rows(place, n, frames, channels)

        def make() -> tuple[Tensor, Program]:
            inlet, program = chain.inlet(self._memory, 0, n, frames), new_program()
            chain.record(program, self._memory, 0, n, frames, outlet)
            return inlet, program

        inlet, program = self._made.get((i, n, frames), make)
        inlet.copy_(x)
        program.run(slots)
        return outlet

    def run(
        self, slots: tuple[int, ...], features: Tensor, audio: Tensor | None, frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return codes [n, 1, frames] and [n, q, frames] of features [n, dim, frames], audio [n, 1, frames * hop]."""
        programs = self.programs
        width = programs.semantic_quantizer.out_weight.shape[1]
        x = self._through(0, slots, frames, features, 2, width)
        codes, latent = programs.semantic_quantizer.search(x, None, return_quantized=self.stages > 0)
        if audio is None or latent is None:
            return codes, None
        channels = programs.acoustic_quantizer.out_weight.shape[1]
        if self.chains[1].layers:
            latent = self._through(1, slots, frames, latent, 3, channels)
        z = self._through(2, slots, frames, audio, 2, channels)
        return codes, programs.acoustic_quantizer.search(z - latent, None, self.stages)[0]
