"""Codebooks that are used to the last entry: a k-means start, and new rows for entries that nothing chooses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import reference
from ..reference.dac import DecoderBlock, EncoderBlock
from ..reference.layers import ResidualUnit, Snake1d, WNConv1d, WNConvTranspose1d, inner_conv
from ..reference.quantize import VectorQuantize


def stages_of(model: reference.DualCodec) -> list[VectorQuantize]:
    """Return all codebooks of a model, the semantic one first."""
    return [*model.semantic_vq.stages(), *model.dac.quantizer.stages()]


_ALPHA, _BRANCH = 0.25, 0.1
Pairs = Iterable[tuple[Tensor, Tensor]]  # audio [B, 1, S] and features [B, C, F]


@torch.no_grad()
def start_semantic(model: reference.DualCodec, batches: Pairs, rounds: int = 10) -> None:
    """Set the semantic codebook to the k-means of what it is given on some batches."""
    rows = [_rows(model.convnext_encoder(features)) for _, features in batches]
    _start_stages(model.semantic_vq.stages(), torch.cat(rows), rounds)


@torch.no_grad()
def start_acoustic(
    model: reference.DualCodec, batches: Pairs, rounds: int = 10, given: Sequence[bool] | None = None
) -> None:
    """Set every acoustic stage by what it is given on some batches, stage after stage.

    Its projections become the principal axes of what is left, there and back, its codebook the k-means along them.

    Args:
        model: changed in place.
        batches: what to look at.
        rounds: of k-means.
        given: which stages stay as they are; None: none.
    """
    rows = [_rows(model.dac._residual(audio, model._semantic(features)[0])) for audio, features in batches]
    _start_stages(model.dac.quantizer.stages(), torch.cat(rows), rounds, axes=True, given=given)


def _rows(z: Tensor) -> Tensor:  # [B, C, F] -> [B F, C]
    return z.transpose(1, 2).reshape(-1, z.shape[1])


def _start_stages(
    stages: list[VectorQuantize], rows: Tensor, rounds: int, axes: bool = False, given: Sequence[bool] | None = None
) -> None:
    residual = rows.t()[None]  # [1, C, N]
    for stage, stays in zip(stages, given or [False] * len(stages), strict=True):
        if not stays:
            if axes:
                _along_axes(stage, residual[0])
            z_e = stage.in_proj(residual)
            stage.codebook.weight.copy_(_k_means(z_e[0].t(), stage.codebook_size, rounds))
        residual = residual - stage(residual)[0]


def _along_axes(stage: VectorQuantize, residual: Tensor) -> None:  # [C, N]
    mean = residual.mean(1, keepdim=True)
    centred = (residual - mean).double()
    axes = torch.linalg.eigh(centred @ centred.t())[1][:, -stage.codebook_dim :].to(residual)  # [C, D]
    for conv, weight in ((stage.in_proj, axes.t()), (stage.out_proj, axes)):
        conv.weight_v.copy_(weight[..., None])
        conv.weight_g.copy_(torch.linalg.vector_norm(conv.weight_v, dim=(1, 2), keepdim=True))
    stage.in_proj.bias.copy_(-(axes.t() @ mean)[:, 0])
    stage.out_proj.bias.copy_(mean[:, 0])


def _k_means(rows: Tensor, count: int, rounds: int) -> Tensor:
    """Spherical k-means, as the search is by angle; each centre is the mean of its un-normalised rows."""
    order = torch.randperm(len(rows))[:count]
    centres = rows[order]
    if len(centres) < count:  # fewer rows than entries: the rest are rows again, a little apart
        extra = rows[torch.randint(len(rows), (count - len(centres),))]
        centres = torch.cat([centres, extra + 0.01 * rows.std() * torch.randn_like(extra)])
    for _ in range(rounds):
        nearest = (F.normalize(rows) @ F.normalize(centres).t()).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        spare = rows[torch.randint(len(rows), (count,))]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), spare)
    return centres


class CodebookCare:
    """Counts how often each entry is chosen, gives unused ones a row of the current batch, and moves the others.

    Args:
        model: whose codebooks are looked after.
        memory_steps: over how many steps counts and means are averaged.
        fewest: an entry is unused when it is chosen less than this fraction of the mean.
        average: set each entry to the running mean of what chose it, instead of leaving it to the codebook loss.
    """

    def __init__(
        self, model: reference.DualCodec, memory_steps: int = 100, fewest: float = 0.1, average: bool = True
    ) -> None:
        self._stages = stages_of(model)
        self._keep, self._fewest, self._average = 1 - 1 / memory_steps, fewest, average
        # Optimistic: an entry has the whole memory to be chosen a first time.
        self.usage = [torch.ones_like(stage.codebook.weight[:, 0]).detach() for stage in self._stages]
        self.sizes = [torch.zeros_like(usage) for usage in self.usage]
        self.sums = [torch.zeros_like(stage.codebook.weight).detach() for stage in self._stages]
        self.restarted = 0

    def state(self) -> dict[str, list[Tensor]]:
        """Return what a checkpoint keeps."""
        return {"usage": self.usage, "sizes": self.sizes, "sums": self.sums}

    def load(self, state: dict[str, list[Tensor]]) -> None:
        """Go on from `state`."""
        self.usage, self.sizes, self.sums = (list(state[name]) for name in ("usage", "sizes", "sums"))

    @torch.no_grad()
    def update(self, codes: list[Tensor], latents: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Take in a step.

        Args:
            codes: of each stage, or of the first few, [B, F].
            latents: what each stage searched for, [B, D, F].
            optimizer: whose moments of a new row are forgotten.
        """
        self.restarted = 0
        for i, (stage, chosen, z_e) in enumerate(zip(self._stages, codes, latents, strict=False)):
            rows, weight, usage = _rows(z_e), stage.codebook.weight, self.usage[i]
            counts = torch.bincount(chosen.flatten(), minlength=stage.codebook_size).to(rows)
            usage.mul_(self._keep).add_(counts / counts.mean(), alpha=1 - self._keep)
            if self._average:
                self.sizes[i].mul_(self._keep).add_(counts)
                self.sums[i].mul_(self._keep).index_add_(0, chosen.flatten(), rows)
                hit = counts > 0
                weight[hit] = (self.sums[i][hit] / self.sizes[i][hit, None]).to(weight.dtype)
            dead = (usage < self._fewest).nonzero()[:, 0]
            if not len(dead):
                continue
            # At most a quarter of the batch at once: the rows would else be one another's copies.
            dead = dead[torch.randperm(len(dead), device=dead.device)[: max(1, len(rows) // 4)]]
            fresh = rows[torch.randperm(len(rows), device=dead.device)[: len(dead)]]
            dead = dead[: len(fresh)]
            weight[dead] = fresh.to(weight.dtype)
            usage[dead], self.sizes[i][dead], self.sums[i][dead] = 1.0, 1.0, fresh
            self.restarted += len(dead)
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value[dead] = 0


@torch.no_grad()
def start_scales(model: reference.DualCodec, audio: Tensor, encoder: bool = True, decoder: bool = True) -> None:
    """Scale the acoustic path's layers so that its output deviates by one on some audio, by 0.1 where it is audio.

    PyTorch's own start shrinks a signal by 0.6 per layer: the encoder's latent would be a hundredth of the semantic
    one, and the acoustic codebooks would learn to code nothing but the semantic latent's negative. Snakes start nearly
    straight, and residual units as little more than their input.

    Args:
        model: changed in place.
        audio: [B, 1, S].
        encoder, decoder: which of the two; the other stays as it is.
    """
    wanted = [(encoder, model.dac.encoder.block), (decoder, model.dac.decoder.model)]
    trunks = [trunk for is_wanted, trunk in wanted if is_wanted]
    for module in (module for trunk in trunks for module in trunk.modules()):
        if isinstance(module, Snake1d):
            module.alpha.fill_(_ALPHA)
        elif isinstance(module, ResidualUnit):
            last = inner_conv(module.block[3])
            last.weight_g.mul_(_BRANCH)
            last.bias.zero_()
    handles = []
    for trunk in trunks:
        for conv in _trunk(trunk):
            handles.append(conv.register_forward_hook(_scale_to_one))
    try:
        model.dac.decoder(model.dac.encoder(audio))
    finally:
        for handle in handles:
            handle.remove()


def _trunk(modules: Iterable[nn.Module]) -> Iterator[WNConv1d | WNConvTranspose1d]:
    """The convolutions that the signal can't pass by."""
    for module in modules:
        inner = getattr(module, "conv", module)
        inner = getattr(inner, "conv", inner)
        if isinstance(inner, WNConv1d | WNConvTranspose1d):
            yield inner
        elif isinstance(module, EncoderBlock | DecoderBlock):
            yield from _trunk(module.block)


def _scale_to_one(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(conv, WNConv1d | WNConvTranspose1d)
    wanted = 0.1 if output.shape[1] == 1 else 1.0  # the last one gives audio, as loud as speech
    scale = output.std().clamp(min=1e-6) / wanted
    conv.weight_g.div_(scale)
    conv.bias.div_(scale)
    return output / scale
