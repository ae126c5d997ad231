"""3x3 convolutions with fewer multiplications, for CPUs: what the deep layers of CNN14 spend their time on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WinogradConv2d(nn.Module):
    """The convolution `conv` (3x3, padding 1, stride 1) by F(2x2, 3x3) of Lavin and Gray (2016), for inference.

    A 4x4 tile of the input gives a 2x2 tile of the output, y = Aᵀ[(G w Gᵀ) ∘ (Bᵀ x B)]A: 16 products where the plain sum
    takes 36, and they are matrix products over channels. Its coefficients are 0, 1 and 1/2, so rounding stays that of float32;
    F(4x4, 3x3) would save more and loses a digit. It pays where channels are many and places few.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == (1, 1) and conv.bias is not None
        g = conv.weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        weight = torch.einsum("iy,kcyx,jx->ijck", g, conv.weight.detach(), g)
        self.weight = nn.Parameter(weight.flatten(0, 1).contiguous(), requires_grad=False)  # [16, C, D]
        self.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, D, H, W]`, with the channels innermost in memory."""
        batch, _, height, width = x.shape
        rows, columns = -(-height // 2), -(-width // 2)  # of output tiles
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 2 * columns - width + 1, 1, 2 * rows - height + 1))
        x = _into([x[:, i : i + 2 * rows : 2] for i in range(4)], 0)
        x = _into([x[:, :, :, i : i + 2 * columns : 2] for i in range(4)], 1)  # [4, 4, B, rows, columns, C]
        products = torch.bmm(x.reshape(16, -1, x.shape[-1]), self.weight).view(4, 4, batch, rows, columns, -1)
        y = _out_of(products, 3)  # [4, B, rows, 2, columns, D]
        y = _out_of(y, 4)  # [B, rows, 2, columns, 2, D]
        y = y.flatten(1, 2).flatten(2, 3)[:, :height, :width] + self.bias
        return y.permute(0, 3, 1, 2)


def _into(lines: list[Tensor], dim: int) -> Tensor:
    """Bᵀ along one axis of the tiles, given as its four lines; the result's lines lie along `place`."""
    a, b, c, d = lines
    return torch.stack([a - c, b + c, c - b, b - d], dim)


def _out_of(products: Tensor, dim: int) -> Tensor:
    """Aᵀ along the first axis (four lines); the two lines of the result lie along `place`."""
    a, b, c, d = products
    return torch.stack([a + b + c, b - c - d], dim)
