def fold(weight, bias, scale, shift):
    return scale[:, None] * weight, bias + shift @ weight


def causal_by_clock(query, key):
    return key.mask[:, None] & (key.t[:, None] <= query.t[:, :, None])


def grouped(xs, weights):
    return torch.bmm(torch.stack(xs), torch.stack(weights))


def padding_share(lengths, batch_size):
    computed = sum(len(b) * int(b.max()) for b in lengths.split(batch_size))
    return 1 - int(lengths.sum()) / computed
