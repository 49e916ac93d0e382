"""What every compiled op computes, in plain PyTorch.

Tensors are logical [B, C, T], any float dtype, any strides; all functions are differentiable. `lengths` [B]
int64 (or None) is the number of valid samples per item: samples of the input at or past it count as zero, and
outputs at or past the item's own output length (the op's length formula applied to `lengths`, 0 for 0) are
zero. T = 0 or B = 0 give empty outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = tuple[int, int]  # samples of zeros to the left and to the right


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Return `x + sin(alpha x)^2 / (alpha + 1e-9)`; x [B, C, T], alpha [C] or [1, C, 1]."""
    alpha = alpha.reshape(1, -1, 1)
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)


def mask_past_lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Set x [B, ..., T] to zero at and past each item's length (also where it holds NaN)."""
    if lengths is None:
        return x
    past = torch.arange(x.shape[-1], device=x.device) >= lengths.to(x.device)[:, None]  # [B, T]
    return x.masked_fill(past.reshape(past.shape[0], *[1] * (x.dim() - 2), past.shape[1]), 0)


def _map_lengths(lengths: Tensor | None, formula: Callable[[Tensor], Tensor]) -> Tensor | None:
    if lengths is None:
        return None
    return torch.where(lengths > 0, formula(lengths).clamp(min=0), torch.zeros_like(lengths))


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = (0, 0),
) -> Tensor:
    """Convolve x [B, Cin, T] with weight [Cout, Cin, K] under explicit padding."""
    if x.shape[-1] == 0 or x.shape[-1] + sum(padding) < (weight.shape[-1] - 1) * dilation + 1:
        # PyTorch refuses a kernel wider than its input; this is empty, and still part of the graph.
        return weight.sum(-1) @ x[..., :0]
    return F.conv1d(F.pad(x, padding), weight, bias, stride=stride, dilation=dilation)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding = (0, 0)) -> Tensor:
    """Convolve x [B, Cin, T], transposed, with weight [Cin, Cout, K]; crop the output by padding."""
    full = (x.shape[-1] - 1) * stride + weight.shape[-1]
    if x.shape[-1] == 0 or full <= sum(padding):
        return weight.sum(-1).t() @ x[..., :0]
    return F.conv_transpose1d(x, weight, bias, stride=stride)[..., padding[0] : full - padding[1]]


def causal_dwconv1d_ref(
    x: Tensor,  # [B, C, T]
    weight: Tensor,  # [C, K]
    bias: Tensor | None = None,  # [C]
    padding: Padding | None = None,
    ln_weight: Tensor | None = None,  # [C]
    ln_bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    lengths: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution, causal unless `padding` says otherwise, and LayerNorm over C when `ln_weight` is
    given.

    Returns:
        [B, C, T + left + right - K + 1]; padding None is (K - 1, 0).
    """
    channels, taps = weight.shape
    left, right = (taps - 1, 0) if padding is None else padding
    x = mask_past_lengths(x, lengths)
    if x.shape[-1] == 0 or x.shape[-1] + left + right < taps:
        y = x[..., :0] * weight.sum(-1)[:, None]
    else:
        y = F.conv1d(F.pad(x, (left, right)), weight[:, None, :], bias, groups=channels)
    if ln_weight is not None:
        y = F.layer_norm(y.transpose(1, 2), (channels,), ln_weight, ln_bias, eps).transpose(1, 2)
    return mask_past_lengths(y, _map_lengths(lengths, lambda n: n + left + right - taps + 1))


def snake_conv1d_ref(
    x: Tensor,  # [B, Cin, T]
    weight: Tensor,  # [Cout, Cin, K]
    bias: Tensor | None = None,  # [Cout]
    alpha: Tensor | None = None,  # [Cin]
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = (0, 0),
    activation: str = "none",
    residual: Tensor | None = None,  # [B, Cout, T']
    lengths: Tensor | None = None,
) -> Tensor:
    """Snake (when `alpha` is given), convolution, activation ("none", "tanh" or "gelu"), then plus
    `residual`.

    Returns:
        [B, Cout, T'] with T' = (T + left + right - (K - 1) dilation - 1) // stride + 1.
    """
    x = mask_past_lengths(x, lengths)
    y = conv1d(x if alpha is None else snake(x, alpha), weight, bias, stride, dilation, padding)
    if activation == "tanh":
        y = torch.tanh(y)
    elif activation == "gelu":
        y = F.gelu(y)
    elif activation != "none":
        raise ValueError(f"snake_conv1d: activation must be 'none', 'tanh' or 'gelu', got {activation!r}")
    if residual is not None:
        y = y + residual
    reach = (weight.shape[-1] - 1) * dilation + 1
    return mask_past_lengths(y, _map_lengths(lengths, lambda n: (n + sum(padding) - reach) // stride + 1))


def repeat_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding) -> Tensor:
    """Repeat every sample of x `stride` times, pad with zeros, convolve with weight [Cout, Cin, K]."""
    return conv1d(x.repeat_interleave(stride, dim=-1), weight, bias, padding=padding)


def snake_upsample1d_ref(
    x: Tensor,  # [B, Cin, T]
    alpha: Tensor | None,  # [Cin]
    weight: Tensor,  # transposed [Cin, Cout, 2S], repeat [Cout, Cin, 2S]
    bias: Tensor | None = None,  # [Cout]
    stride: int = 2,
    mode: str = "transposed",
    padding: Padding = (0, 0),
    lengths: Tensor | None = None,
) -> Tensor:
    """Snake (when `alpha` is given), then upsampling by `stride`.

    Returns:
        mode "transposed": transposed convolution, its (T + 1) S outputs cropped by `padding` on the left and
        right. mode "repeat": nearest-repeat by S, `padding` zeros, convolution: T S + left + right - 2S + 1
        samples.
    """
    x = mask_past_lengths(x, lengths)
    if alpha is not None:
        x = snake(x, alpha)
    crop = sum(padding)
    if mode == "transposed":
        y = conv_transpose1d(x, weight, bias, stride, padding)
        out_lengths = _map_lengths(lengths, lambda n: (n + 1) * stride - crop)
    elif mode == "repeat":
        y = repeat_conv1d(x, weight, bias, stride, padding)
        out_lengths = _map_lengths(lengths, lambda n: n * stride + crop - weight.shape[-1] + 1)
    else:
        raise ValueError(f"snake_upsample1d: mode must be 'transposed' or 'repeat', got {mode!r}")
    return mask_past_lengths(y, out_lengths)


def snake_upsample1d_pair_ref(
    x: Tensor,  # [B, Cin, T]
    alpha: Tensor | None,  # [Cin]
    weight: Tensor,  # as of snake_upsample1d_ref
    bias: Tensor | None = None,  # [Cout]
    stride: int = 2,
    mode: str = "transposed",
    padding: Padding = (0, 0),
    lengths: Tensor | None = None,
    *,
    out_alpha: Tensor,  # [Cout]
) -> tuple[Tensor, Tensor]:
    """Return what `snake_upsample1d_ref` returns, and Snake of it."""
    y = snake_upsample1d_ref(x, alpha, weight, bias, stride, mode, padding, lengths)
    return y, snake(y, out_alpha)


def residual_unit_ref(
    x: Tensor,  # [B, C, T]
    alpha1: Tensor,  # [C]
    weight1: Tensor,  # [C, C, 7]
    bias1: Tensor | None,  # [C]
    alpha2: Tensor,  # [C]
    weight2: Tensor,  # [C, C, 1]
    bias2: Tensor | None,  # [C]
    dilation: int = 1,
    padding: Padding | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    out_alpha: Tensor | None = None,  # [C]
    snaked: Tensor | None = None,  # [B, C, T]
) -> Tensor:
    """Snake, dilated convolution (k=7), Snake, 1x1 convolution, plus the input sample that the output stands
    for; with `out_alpha` Snake of that. `snaked` stands for the first Snake of x.

    Returns:
        [B, C, T'] with T' = T + left + right - 6 dilation; padding None is (6d, 0) when causal, else (3d,
        3d). To output t is added x[t - left + (6d when causal, else 3d)], zero where that lies outside.
    """
    reach = 6 * dilation
    centre = reach if causal else reach // 2
    left, right = padding if padding is not None else (centre, reach - centre)
    x = mask_past_lengths(x, lengths)
    snaked = snake(x, alpha1) if snaked is None else mask_past_lengths(snaked, lengths)
    y = conv1d(snaked, weight1, bias1, dilation=dilation, padding=(left, right))
    y = conv1d(snake(y, alpha2), weight2, bias2)
    y = y + F.pad(x, (left, right))[..., centre : centre + y.shape[-1]]
    if out_alpha is not None:
        y = snake(y, out_alpha)
    return mask_past_lengths(y, _map_lengths(lengths, lambda n: n + left + right - reach))


def residual_unit_pair_ref(
    x: Tensor,  # [B, C, T]
    alpha1: Tensor,  # this and what follows as of residual_unit_ref
    weight1: Tensor,
    bias1: Tensor | None,
    alpha2: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    dilation: int = 1,
    padding: Padding | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    *,
    out_alpha: Tensor,  # [C]
    snaked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `residual_unit_ref` returns without `out_alpha`, and Snake of it."""
    tensors = (alpha1, weight1, bias1, alpha2, weight2, bias2)
    y = residual_unit_ref(x, *tensors, dilation, padding, causal, lengths, snaked=snaked)
    return y, snake(y, out_alpha)


def nearest_rows(e: Tensor, codebook: Tensor, return_margin: bool = False) -> tuple[Tensor, Tensor | None]:
    """Find the codebook row nearest to each vector, both L2-normalised; the lowest index wins a tie.

    Args:
        e: [M, D] float32 or float64.
        codebook: [N, D], un-normalised.
        return_margin: also return the second smallest minus the smallest squared distance.

    Returns:
        index [M] int64 (0 where e holds NaN) and margin [M] or None (inf when N = 1, NaN where e holds NaN).

    Numerics: zeros normalise to zero, so the rows' normalised squares stay in the score: with e = 0 the row
    of the
        smallest square wins. The square of e is the same for all rows and is left out.
    """
    rows = F.normalize(codebook)
    score = rows.pow(2).sum(1) - 2 * F.normalize(e) @ rows.t()  # [M, N]: squared distance - |e|^2
    index = score.argmin(1)  # of equal minima the first; a row of NaN gives 0
    if not return_margin:
        return index, None
    if score.shape[1] == 1:
        return index, torch.where(score[:, 0].isnan(), score[:, 0], torch.inf)
    two = score.topk(2, dim=1, largest=False, sorted=True).values
    return index, two[:, 1] - two[:, 0]


def search_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which codes are searched for: never less than float32."""
    return dtype if dtype == torch.float64 else torch.float32


def straight_through(z_q: Tensor, z_e: Tensor) -> Tensor:
    """Return z_q (NaN where z_e is not finite) with the gradient of z_e."""
    return z_q.detach() + (z_e - z_e.detach())


def rvq_search_ref(
    z: Tensor,  # [B, C, F]
    in_weight: Tensor,  # [Q, D, C]
    in_bias: Tensor,  # [Q, D]
    codebooks: Tensor,  # [Q, N, D]
    out_weight: Tensor,  # [Q, C, D]
    out_bias: Tensor,  # [Q, C]
    num_quantizers: int | None = None,
    return_quantized: bool = False,
    return_margin: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Residual vector quantisation: each stage codes what the stages before it left over.

    Args:
        num_quantizers: q, the number of stages to run (1 to Q, None: all).
        return_quantized: also return the sum over the stages of out_proj(winning row, un-normalised).
        return_margin: also return how clear each choice was, see `nearest_rows`.

    Returns:
        codes [B, q, F] int64, quantized [B, C, F] or None, margin [B, q, F] float or None. Past an item's
        length all three are 0. A NaN frame gives codes 0 and a NaN sum.

    Numerics: float32 at least, whatever the dtype and autocast. The gradient of quantized passes straight
    through the
        choice to z, in_weight and in_bias; codebooks get none (training reaches them through the codebook
        loss).
    """
    stages = codebooks.shape[0]
    q = stages if num_quantizers is None else num_quantizers
    if not 1 <= q <= stages:
        raise ValueError(f"rvq_search: num_quantizers must be in [1, {stages}], got {num_quantizers}")
    batch, _, frames = z.shape
    dtype = search_dtype(z.dtype)
    with torch.autocast(device_type=z.device.type, enabled=False):
        residual = mask_past_lengths(z, lengths).to(dtype)
        quantized = torch.zeros_like(residual)
        codes, margins = [], []
        for i in range(q):
            book = codebooks[i].to(dtype)
            e = in_weight[i].to(dtype) @ residual + in_bias[i].to(dtype)[:, None]  # [B, D, F]
            index, margin = nearest_rows(e.transpose(1, 2).reshape(-1, e.shape[1]), book, return_margin)
            codes.append(index.reshape(batch, frames))
            if margin is not None:
                margins.append(margin.reshape(batch, frames))
            chosen = straight_through(F.embedding(codes[-1], book).transpose(1, 2), e)  # [B, D, F]
            z_q = out_weight[i].to(dtype) @ chosen + out_bias[i].to(dtype)[:, None]  # [B, C, F]
            quantized, residual = quantized + z_q, residual - z_q
    return (
        mask_past_lengths(torch.stack(codes, dim=1), lengths),
        mask_past_lengths(quantized.to(z.dtype), lengths) if return_quantized else None,
        mask_past_lengths(torch.stack(margins, dim=1), lengths) if return_margin else None,
    )


def check_codes(name: str, codes: Tensor, entries: int, argument: str = "codes") -> None:
    """Raise one line that names the first code of codes [B, q, F] that lies outside [0, entries)."""
    wrong = (codes < 0) | (codes >= entries)
    if wrong.any():
        b, stage, frame = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{name}: {argument} must be in [0, {entries}), got {int(codes[b, stage, frame])}"
            f" at batch {b}, stage {stage}, frame {frame}"
        )


def rvq_lookup_ref(
    codes: Tensor,  # [B, q, F] integers
    codebooks: Tensor,  # [Q, N, D]
    out_weight: Tensor,  # [Q, C, D]
    out_bias: Tensor,  # [Q, C]
    addend: Tensor | None = None,  # [B, C, F]
    lengths: Tensor | None = None,
) -> Tensor:
    """Turn the codes of the first q stages back into the sum of their out_proj(row), plus `addend`.

    Returns:
        [B, C, F] in the dtype of addend, or of codebooks.

    Raises:
        ValueError: a code outside [0, N) before its item's length, or more stages than codebooks.
    """
    if codes.shape[1] > codebooks.shape[0]:
        raise ValueError(f"rvq_lookup: codes must have at most {codebooks.shape[0]} stages, got {codes.shape[1]}")
    codes = mask_past_lengths(codes, lengths).long()
    check_codes("rvq_lookup", codes, codebooks.shape[1])
    total = codebooks.new_zeros(codes.shape[0], out_weight.shape[1], codes.shape[2])
    for i in range(codes.shape[1]):
        rows = F.embedding(codes[:, i], codebooks[i]).transpose(1, 2)  # [B, D, F]
        total = total + (out_weight[i] @ rows + out_bias[i][:, None])
    if addend is not None:
        total = (total + addend).to(addend.dtype)
    return mask_past_lengths(total, lengths)
