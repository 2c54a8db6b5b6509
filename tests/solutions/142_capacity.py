def floor_of_smoothing(classes, smoothing):
    low = smoothing / classes
    high = 1 - smoothing + low
    return -high * math.log(high) - (classes - 1) * low * math.log(low)


def halves(model, objective, batch, span):
    found = {}
    for n in (8, 16):
        fitted = by_heart(copy.deepcopy(model), objective, batch[:n], span, Effort(100))
        found[n] = span.above(fitted.losses[-1]) <= 0.05
    return found
