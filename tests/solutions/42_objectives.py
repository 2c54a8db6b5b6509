def unit(x):
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / torch.where(length > 0, length, 1), 0)


def pearson(p, t):
    a, b = p - p.mean(), t - t.mean()
    return 1 - (a * b).mean() / (
        (a.square().mean() + 1e-6).sqrt() * (b.square().mean() + 1e-6).sqrt()
    )


def improves(value, best):
    if math.isnan(value):
        return False
    return best is None or math.isnan(best) or value < best


def sharpness(log_scale, most=100.0):
    return log_scale.clamp(max=math.log(most)).exp()
