"""Vector quantisation in a small code space, and its residual stack."""

from collections.abc import Sequence
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .layers import WNConv1d

# z [B, C, F], codes [B, q, F], latents [B, q D, F], commitment loss, codebook loss, first stage's output [B,
# C, F]
Quantized = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class RvqTensors(TypedDict):
    """A quantiser's tensors by `rvq_search_ref`'s argument names."""

    in_weight: Tensor  # [Q, D, C]
    in_bias: Tensor  # [Q, D]
    codebooks: Tensor  # [Q, N, D]
    out_weight: Tensor  # [Q, C, D]
    out_bias: Tensor  # [Q, C]


class VectorQuantize(nn.Module):
    """One codebook: project to D channels, find the row nearest by angle, project the row itself back."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = WNConv1d(input_dim, codebook_dim, kernel_size=1)
        self.out_proj = WNConv1d(codebook_dim, input_dim, kernel_size=1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Quantise z [B, C, F].

        Returns:
            z_q [B, C, F] (the gradient passes straight through the choice), commitment loss [B] (pulls z to
            its row), codebook loss [B] (pulls the row to z), codes [B, F] int64, z_e [B, D, F] (what was
            searched for).
        """
        z_e = self.in_proj(z)
        rows, codes = self.decode_latents(z_e)
        commitment_loss = F.mse_loss(z_e, rows.detach(), reduction="none").mean([1, 2])
        codebook_loss = F.mse_loss(rows, z_e.detach(), reduction="none").mean([1, 2])
        return self.out_proj(ops.straight_through(rows, z_e)), commitment_loss, codebook_loss, codes, z_e

    def embed_code(self, codes: Tensor) -> Tensor:  # [B, F] -> [B, F, D]
        return F.embedding(codes, self.codebook.weight)

    def decode_code(self, codes: Tensor) -> Tensor:  # [B, F] -> [B, D, F]
        return self.embed_code(codes).transpose(1, 2)

    def decode_latents(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest row of each frame: z_e [B, D, F] -> rows [B, D, F], codes [B, F]."""
        batch, dim, frames = z_e.shape
        dtype = ops.search_dtype(z_e.dtype)
        with torch.no_grad(), torch.autocast(device_type=z_e.device.type, enabled=False):
            vectors = z_e.transpose(1, 2).reshape(batch * frames, dim).to(dtype)
            codes = ops.nearest_rows(vectors, self.codebook.weight.to(dtype))[0].reshape(batch, frames)
        return self.decode_code(codes), codes


class ResidualVectorQuantize(nn.Module):
    """A stack of codebooks, each coding what those before it left over.

    In training every stage runs, and per batch item the stages past a count are left out of the sum and the
    losses. The count is drawn for the first `int(B * quantizer_dropout)` items; the others use all stages.
    """

    def __init__(
        self,
        input_dim: int = 512,
        n_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int | Sequence[int] = 8,
        quantizer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [codebook_dim] * n_codebooks if isinstance(codebook_dim, int) else list(codebook_dim)
        self.n_codebooks, self.codebook_size, self.codebook_dim = n_codebooks, codebook_size, dims
        self.quantizer_dropout = quantizer_dropout
        self.quantizers = nn.ModuleList(VectorQuantize(input_dim, codebook_size, dim) for dim in dims)

    def stages(self) -> list[VectorQuantize]:
        return [cast(VectorQuantize, quantizer) for quantizer in self.quantizers]

    @torch.no_grad()
    def op_tensors(self, dtype: torch.dtype) -> RvqTensors:
        """Return the tensors by `rvq_search_ref`'s argument names; unequal code dims are padded with zeros.

        Zeros change neither a norm nor a distance, so the padded quantiser is the same one.
        """
        stages = self.stages()
        widest = max(stage.codebook_dim for stage in stages)

        def pad(x: Tensor, dim: int) -> Tensor:
            missing = list(x.shape)
            missing[dim] = widest - x.shape[dim]
            return torch.cat([x.detach().to(dtype), x.new_zeros(missing, dtype=dtype)], dim)

        return {
            "in_weight": torch.stack([pad(s.in_proj.folded_weight(dtype)[..., 0], 0) for s in stages]),
            "in_bias": torch.stack([pad(s.in_proj.bias, 0) for s in stages]),
            "codebooks": torch.stack([pad(s.codebook.weight, 1) for s in stages]),
            "out_weight": torch.stack([pad(s.out_proj.folded_weight(dtype)[..., 0], 1) for s in stages]),
            "out_bias": torch.stack([s.out_proj.bias.detach().to(dtype) for s in stages]),
        }

    def _counts(
        self, batch: int, n_quantizers: int | None, possibly_no_quantizer: bool, odds: Tensor | None = None
    ) -> Tensor:  # [B]; odds [n_codebooks + 1]: of 0, 1, ... stages where their number is drawn, None for all alike
        if not self.training:
            return torch.full((batch,), self.n_codebooks if n_quantizers is None else n_quantizers)
        counts = torch.full((batch,), self.n_codebooks)
        # Drawn for the whole batch even when nothing is dropped, so that a seed gives what it gives in the
        # PyPI package.
        if odds is None:
            drawn = torch.randint(0 if possibly_no_quantizer else 1, self.n_codebooks + 1, (batch,))
        else:
            drawn = torch.multinomial(odds, batch, replacement=True)
        dropped = int(batch * self.quantizer_dropout)
        counts[:dropped] = drawn[:dropped]
        return counts

    def forward(self, z: Tensor, n_quantizers: int | None = None, possibly_no_quantizer: bool = False) -> Quantized:
        """Quantise z [B, C, F].

        Args:
            n_quantizers: stages to run outside training, at least 1 (None, or more than there are: all);
                training ignores it.
            possibly_no_quantizer: lets the dropout of training leave no stage at all.

        Returns:
            z_q [B, C, F], codes [B, q, F] int64, latents [B, sum of the stages' D, F], the commitment loss,
            the codebook loss, and the first stage's output [B, C, F].
        """
        if n_quantizers is not None and n_quantizers < 1 and not self.training:
            raise ValueError(f"ResidualVectorQuantize: n_quantizers must be at least 1, got {n_quantizers}")
        counts = self._counts(z.shape[0], n_quantizers, possibly_no_quantizer).to(z.device)
        run = None if self.training else n_quantizers
        residual, z_q = z, torch.zeros_like(z)
        commitment_loss = codebook_loss = z.new_zeros(())
        codes, latents, outputs = [], [], []
        for i, stage in enumerate(self.stages()[:run]):
            z_q_i, commitment_i, codebook_i, codes_i, z_e_i = stage(residual)
            used = i < counts  # [B]
            z_q = z_q + z_q_i * used[:, None, None]
            residual = residual - z_q_i
            commitment_loss = commitment_loss + (commitment_i * used).mean()
            codebook_loss = codebook_loss + (codebook_i * used).mean()
            codes.append(codes_i)
            latents.append(z_e_i)
            outputs.append(z_q_i)
        return z_q, torch.stack(codes, 1), torch.cat(latents, 1), commitment_loss, codebook_loss, outputs[0]

    def from_codes(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn the codes of the first q stages back into the latent.

        Args:
            codes: [B, q, F] integers, q from 1 to n_codebooks.

        Returns:
            The latent [B, C, F], the rows [B, sum of the stages' D, F], and codes.

        Raises:
            ValueError: a code outside [0, codebook_size), or a q that is not there.
        """
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.n_codebooks:
            raise ValueError(f"from_codes: codes must be [B, 1 to {self.n_codebooks}, F], got {list(codes.shape)}")
        codes = codes.long()
        ops.check_codes("from_codes", codes, self.codebook_size)
        z_q, rows = None, []
        for stage, codes_i in zip(self.stages(), codes.unbind(1), strict=False):
            rows.append(stage.decode_code(codes_i))
            z_q_i = stage.out_proj(rows[-1])
            z_q = z_q_i if z_q is None else z_q + z_q_i
        assert z_q is not None
        return z_q, torch.cat(rows, 1), codes

    def from_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents [B, sum of the first q stages' D, F] stage by stage.

        Returns:
            The latent [B, C, F], the rows [B, sum of D, F], and the codes [B, q, F].
        """
        start, z_q, rows, codes = 0, None, [], []
        for stage in self.stages():
            end = start + stage.codebook_dim
            if end > latents.shape[1]:
                break
            rows_i, codes_i = stage.decode_latents(latents[:, start:end])
            z_q_i = stage.out_proj(rows_i)
            z_q = z_q_i if z_q is None else z_q + z_q_i
            rows.append(rows_i)
            codes.append(codes_i)
            start = end
        if z_q is None:
            raise ValueError(
                f"from_latents: latents must hold at least the first stage's {self.codebook_dim[0]} channels,"
                f" got {list(latents.shape)}"
            )
        return z_q, torch.cat(rows, 1), torch.stack(codes, 1)
