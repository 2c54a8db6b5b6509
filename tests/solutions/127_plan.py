def inverse_root(update, total, warm):
    return (update + 1) / warm if update < warm else (warm / (update + 1)) ** 0.5


def layer_rates(layers, top, decay):
    return {f"layer.{i}.*": top * decay ** (layers - 1 - i) for i in range(layers)} | {"*": top}


def shuffled_blocks(n, size, seed, epoch):
    return [
        row
        for block in epoch_order(-(-n // size), seed, epoch)
        for row in range(block * size, min((block + 1) * size, n))
    ]
