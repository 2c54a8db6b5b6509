def inverse_variance(sd, present):
    trust = torch.where(present, sd, 1).square().reciprocal() * present
    return trust / trust.sum(1, keepdim=True).clamp(min=1e-12)


def low_rank_numbers(modalities, size, rank, width):
    return modalities * rank * (size + 1) * width + width, (size + 1) ** modalities * width + width


class Largest(nn.Module):
    def forward(self, streams):
        means = torch.stack([masked_mean(s.x, s.mask) for s in streams.values()], 1)
        present = torch.stack([s.mask.any(1) for s in streams.values()], 1)
        largest = means.masked_fill(~present.unsqueeze(-1), -torch.inf).amax(1)
        return Fused(torch.where(present.any(1, keepdim=True), largest, 0))


class Film(nn.Module):
    def __init__(self, widths, of, by):
        super().__init__()
        self.of, self.by = of, by
        self.scale, self.shift = (
            nn.Linear(widths[by], widths[of]),
            nn.Linear(widths[by], widths[of]),
        )

    def forward(self, streams):
        of, by = (masked_mean(streams[n].x, streams[n].mask) for n in (self.of, self.by))
        there = streams[self.by].mask.any(1, keepdim=True)
        return Fused(torch.where(there, (1 + self.scale(by)) * of + self.shift(by), of))
