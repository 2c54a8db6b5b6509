def entropy(weights):
    return torch.special.entr(torch.where(weights > 0, weights, 1)).sum(-1)


def within(query, key, radius):
    near = (query.t[:, :, None] - key.t[:, None, :]).abs() <= radius
    return near & query.mask[:, :, None] & key.mask[:, None, :]


def lag(weights, query_t, key_t):
    gap = key_t[:, None, :] - query_t[:, :, None]
    return (weights * gap).sum(-1) / weights.sum(-1).clamp(min=1e-9)


class Additive(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.W, self.U, self.v = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden, bias=False),
            nn.Linear(hidden, 1, bias=False),
        )

    def forward(self, query, key):
        return self.v(torch.tanh(self.W(query)[:, :, None] + self.U(key)[:, None])).squeeze(-1)
