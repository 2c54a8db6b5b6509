def dilations_for(seconds, rate):
    dilations = []
    while chain([(3, 1, d) for d in dilations]) < seconds * rate:
        dilations.append(2 ** len(dilations))
    return dilations


def frames_ahead(function, x):
    seen = reach(function, x, 2)
    return seen.first + seen.size - 1


def through_pool(kernel, stride, before):
    return before.size + (kernel - 1) * before.stride, before.stride * stride
