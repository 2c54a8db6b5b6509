def smooth(values, weight):
    total, out = 0.0, []
    for n, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        out.append(total / (1 - weight**n))
    return out


def as_drawn(records):
    kept = []
    for step, value in records:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept
