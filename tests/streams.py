"""What tests of encoders and fusions share: streams with more padding, modules whose weights are
nowhere special.
"""

import torch
from torch import nn

from mmemo.core.batch import Stream


def padded(s: Stream, by: int, fill: float = 3.0, when: float = 0.0) -> Stream:
    "The stream with `by` more steps that are not real, of value `fill` and time `when`."
    B = len(s)
    return Stream(
        torch.cat([s.x, torch.full((B, by, *s.x.shape[2:]), fill, dtype=s.x.dtype)], 1),
        torch.cat([s.mask, torch.zeros(B, by, dtype=torch.bool)], 1),
        torch.cat([s.t, torch.full((B, by), when)], 1),
    )


def learned(module: nn.Module, seed: int = 1, scale: float = 0.5) -> nn.Module:
    """A module whose weights are nowhere zero and whose norms are not at their starting point, as
    after training.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return module.eval()


def pictures(B: int, T: int, size: int, seed: int, lost: int) -> Stream:
    """Frames of different numbers, that at place `lost` of the first item dropped; the last item
    is missing.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([T, *[T // 2] * (B - 1)]).unsqueeze(1)
    mask[0, lost], mask[-1] = False, False
    return Stream(
        torch.randint(0, 256, (B, T, 3, size, size + 4), generator=g, dtype=torch.uint8),
        mask,
        ((torch.arange(T) + 0.5) / 8).repeat(B, 1),
    )
