def after(widths, sds, square=1.0):
    for width, sd in zip(widths, sds):
        square = square * width * sd**2 / 2
    # the first layer has no ReLU before it, the last one has one behind it: each layer's product
    # is halved by its own ReLU
    return square


def unit_start(layers, x):
    with torch.no_grad():
        for layer in layers:
            y = layer(x)
            if isinstance(layer, nn.Linear):
                layer.weight /= y.square().mean().sqrt()
                y = layer(x)
            x = y


def runs_needed(bound):
    return next(n for n in itertools.count(1) if share_of(0, n).high < bound)
