def area(points):
    lines = {}
    for p in points:
        lines.setdefault((p.kind, p.model), []).append((p.share, p.score.value))
    found = {}
    for key, line in lines.items():
        share, value = np.array(sorted(line)).T
        found[key] = float(
            ((value[1:] + value[:-1]) / 2 * np.diff(share)).sum() / (share[-1] - share[0])
        )
    return found


def breaks_at(points, kind, model, limit):
    line = sorted((p.share, p.score.value) for p in points if (p.kind, p.model) == (kind, model))
    if line[0][1] >= limit:
        return line[0][0]
    for (a, x), (b, y) in zip(line, line[1:]):
        if y >= limit:
            return a + (b - a) * (limit - x) / (y - x)
    return math.inf


def blackout(data, name, start, stop):
    s = data.streams[name]
    keep = (s.t < start) | (s.t >= stop)
    return data.replace(
        **{name: Stream(s.x.masked_fill(~keep.unsqueeze(-1), 0), s.mask & keep, s.t)}
    )


def misheard(ids, share, vocabulary, seed=0):
    g = torch.Generator().manual_seed(seed)
    wrong = (torch.rand(ids.x.shape, generator=g) < share) & ids.mask
    other = (ids.x + torch.randint(1, vocabulary, ids.x.shape, generator=g)) % vocabulary
    return ids.with_x(torch.where(wrong, other, ids.x))
