"""placeholder"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def difference_sweep(codes, weight, bias, rest_loss, loss):
    S, B, n, k = codes.shape
    hidden = F.linear(codes.flatten(-2), weight, bias)
    columns = weight.T.view(n, k, -1)
    out = torch.empty_like(codes)
    for i in range(n):
        own = codes[:, :, i] @ columns[i]
        for j in range(k):
            out[:, :, i, j] = rest_loss(hidden + columns[i, j] - own)
    return out


def bernoulli_linear_sweep(codes, weight, bias, images, loss):
    return difference_sweep(codes, weight, bias, lambda h: F.softplus(h).sum(-1) - (images * h).sum(-1), loss)
