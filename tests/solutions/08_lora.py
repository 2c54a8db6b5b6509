def rank_for(delta, share):
    squares = torch.linalg.svdvals(delta).square()
    held = squares.cumsum(0) / squares.sum()
    return min(int((held < share).sum()) + 1, len(held))


def best_factors(delta, r):
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :r] * S[:r], V[:r]


def count_lora(module, targets, r):
    chosen = [
        m
        for n, m in module.named_modules()
        if type(m) is nn.Linear and any(f".{n}".endswith(f".{t}") for t in targets)
    ]
    return sum(r * (m.in_features + m.out_features) for m in chosen)


def partly(layer, share):
    linear = copy.deepcopy(layer.linear)
    with torch.no_grad():
        linear.weight += share * layer.scale * layer.B @ layer.A
    return linear
