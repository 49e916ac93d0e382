"""The layers of the codec; parameters carry the PyPI package's names, so that its checkpoints load."""

import math

import torch
from torch import Tensor, nn

from . import ops


class Snake1d(nn.Module):
    """`x + sin(alpha x)^2 / (alpha + 1e-9)` with one alpha per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        return ops.snake(x, self.alpha)


class _WeightNorm(nn.Module):
    """A weight `g * v / |v|` with one length g per slice along dim 0, kept as plain parameters.

    torch.nn.utils.weight_norm hangs a computed tensor and a hook on the module, which breaks deepcopy, pickle
    and construction under inference_mode. The weight here exists only while `forward` runs.
    """

    def __init__(self, shape: tuple[int, int, int], out_channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.weight_g = nn.Parameter(torch.empty(shape[0], 1, 1))
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # nn.Conv1d's and nn.ConvTranspose1d's own initialisation; g starts as the length of v.
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight_v.shape[1] * self.weight_v.shape[2])
        nn.init.uniform_(self.bias, -bound, bound)
        self.weight_g.copy_(torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True))

    def weight(self) -> Tensor:
        """Return the weight as training sees it: differentiable, in the dtype of the parameters."""
        return self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True))

    @torch.no_grad()
    def folded_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight folded in float64, then cast to `dtype` (None: that of the parameters)."""
        v, g = self.weight_v.double(), self.weight_g.double()
        folded = v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
        return folded.to(dtype or self.weight_v.dtype)


class WNConv1d(_WeightNorm):
    """Weight-normed convolution; `padding` is one number for both sides or (left, right)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size), out_channels)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.dilation = stride, dilation
        self.padding = (padding, padding) if isinstance(padding, int) else padding

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, T] -> [B, Cout, T']
        return ops.conv1d(x, self.weight(), self.bias, self.stride, self.dilation, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}, dilation={self.dilation}"
        )


class WNConvTranspose1d(_WeightNorm):
    """Weight-normed transposed convolution; g is per *input* channel. T -> (T - 1) stride + k - 2 padding."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__((in_channels, out_channels, kernel_size), out_channels)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride = stride
        self.padding = (padding, padding)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, T] -> [B, Cout, T']
        return ops.conv_transpose1d(x, self.weight(), self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" padding={self.padding}"
        )


class CausalConv1d(nn.Module):
    """A convolution padded on the left alone, so that output t sees nothing past the stride's last sample.

    The layer of its own is what gives causal checkpoints their `.conv.` in the parameter names.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        left = (kernel_size - 1) * dilation + 1 - stride
        self.conv = WNConv1d(in_channels, out_channels, kernel_size, stride, (left, 0), dilation)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, T] -> [B, Cout, T // stride]
        return self.conv(x)

    def folded_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.conv.folded_weight(dtype)


def inner_conv(conv: nn.Module) -> WNConv1d:
    """Return the convolution inside a causal wrapper, or the convolution itself."""
    inner = conv.conv if isinstance(conv, CausalConv1d) else conv
    assert isinstance(inner, WNConv1d)
    return inner


class CausalUpsample(nn.Module):
    """Nearest-repeat by `stride`, then a convolution with k = 2 stride: T -> T stride.

    Without look-ahead output t sees input frames up to t // stride; with it a bounded stretch more.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, look_ahead: bool = False) -> None:
        super().__init__()
        taps = 2 * stride
        self.stride = stride
        left = math.ceil(stride / 2) if look_ahead else taps - 1
        self.padding = (left, taps - 1 - left)
        # Two shapes of the same thing, because the checkpoints name them differently: block.1.conv and
        # block.1.conv.conv.
        self.conv: WNConv1d | CausalConv1d
        if look_ahead:
            self.conv = WNConv1d(in_channels, out_channels, taps, padding=self.padding)
        else:
            self.conv = CausalConv1d(in_channels, out_channels, taps)

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, T] -> [B, Cout, T * stride]
        return self.conv(x.repeat_interleave(self.stride, dim=-1))

    def folded_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.conv.folded_weight(dtype)


def make_conv(
    causal: bool,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    padding: int,
    stride: int = 1,
    dilation: int = 1,
) -> WNConv1d | CausalConv1d:
    """Make a causal convolution, or one with `padding` on both sides."""
    if causal:
        return CausalConv1d(in_channels, out_channels, kernel_size, stride, dilation)
    return WNConv1d(in_channels, out_channels, kernel_size, stride, padding, dilation)


class ResidualUnit(nn.Module):
    """Snake, dilated convolution (k=7), Snake, 1x1 convolution, plus the input."""

    def __init__(self, dim: int = 16, dilation: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.dim, self.dilation, self.causal = dim, dilation, causal
        self.block = nn.Sequential(
            Snake1d(dim),
            make_conv(causal, dim, dim, kernel_size=7, padding=3 * dilation, dilation=dilation),
            Snake1d(dim),
            make_conv(causal, dim, dim, kernel_size=1, padding=0),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T] -> [B, C, T]
        return x + self.block(x)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution (k=7), LayerNorm, two linear layers with GELU between, plus the input."""

    def __init__(self, dim: int, intermediate_dim: int = 2048, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.dwconv = nn.Conv1d(dim, dim, kernel_size=7, padding=0 if is_causal else 3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, intermediate_dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(intermediate_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, F] -> [B, C, F]
        y = ops.causal_dwconv1d_ref(
            x,
            self.dwconv.weight[:, 0],
            self.dwconv.bias,
            (6, 0) if self.is_causal else (3, 3),
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )
        y = self.pwconv2(self.act(self.pwconv1(y.transpose(1, 2))))  # [B, F, C]
        return x + y.transpose(1, 2)
