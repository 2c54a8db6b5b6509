def masked_max(x, mask):
    return torch.where(
        mask.any(1, keepdim=True), x.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1), 0
    )


def modality_dropout(batch, p, generator):
    names = list(batch.streams)
    had = torch.stack([batch.streams[n].mask.any(1) for n in names])
    keep = had & (torch.rand(had.shape, generator=generator) > p)
    # one stream that was there, at random
    rescued = (torch.rand(had.shape, generator=generator) * had).argmax(0)
    keep[rescued, torch.arange(len(batch))] |= had.any(0) & ~keep.any(0)

    def drop(s, k):
        return Stream(torch.where(k[:, None, None], s.x, 0), s.mask & k[:, None], s.t)

    return batch.replace(**{n: drop(batch.streams[n], k) for n, k in zip(names, keep)})


def resample(stream, rate):
    start, stop = stream.t[stream.mask].min(), stream.t[stream.mask].max()
    T = max(1, round(float(stop - start) * rate))
    t = (start + (torch.arange(T) + 0.5) / rate).expand(len(stream), T)
    return align(
        stream, Stream(torch.zeros(len(stream), T), torch.ones(len(stream), T, dtype=torch.bool), t)
    )
