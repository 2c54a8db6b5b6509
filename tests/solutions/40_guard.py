import torch
from torch import nn


def first_to_grow(norms, factor):
    for update in range(3, len(norms)):
        over = norms[update] > factor * norms[:update].median(0).values
        if over.any():
            return int(over.nonzero()[0]), update


def unpoison(model):
    count = 0
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not (
            torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()
        ):
            norm.reset_running_stats()
            count += 1
    return count
