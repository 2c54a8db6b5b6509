def motion(stream):
    both = stream.mask[:, 1:] & stream.mask[:, :-1]
    change = stream.x.float().diff(dim=1).abs().mean((2, 3, 4))
    return (change * both).sum(1) / both.sum(1).clamp(min=1)


def loudness(stream):
    power = (stream.x.square() * stream.mask).sum(1) / stream.mask.sum(1).clamp(min=1)
    return (10 * power.log10()).clamp(min=-120)


def left_out(report):
    return [line.split(": ")[0] for line in report if line.endswith(": left out")]
