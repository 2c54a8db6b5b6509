def delta(stream):
    real = stream.mask[:, 1:] & stream.mask[:, :-1]
    return stream.with_x(F.pad(stream.x.diff(dim=1) * real.unsqueeze(-1), (0, 0, 0, 1)))


def behind(mask, strides):
    for _ in range(strides):
        mask = halve_clock(mask, torch.zeros(mask.shape))[0]
    return mask


def moved(before, after):
    return sorted(name for name, value in before.items() if not torch.equal(value, after[name]))
