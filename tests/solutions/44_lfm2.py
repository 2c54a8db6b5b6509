"Solutions to the exercises of nbs/17d_giant.ipynb."

import torch


def last_token(x, mask):
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    return x[torch.arange(len(x)), last] * mask.any(1, keepdim=True)


def first_step(gradient, lr, eps):
    # corrected for bias, m is g and v is g²
    return torch.where(gradient == 0, 0, lr * gradient / (gradient.abs() + eps))


def survives(eps, kind):
    return bool(torch.tensor(eps, dtype=torch.float64).to(kind) > 0)


def conv_layer(width, ffn):
    return 2 * width + 3 * width**2 + 3 * width + width**2 + 3 * width * ffn
