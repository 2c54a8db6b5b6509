import math


def lora_count(layers, width, targets, rank):
    return layers * targets * 2 * rank * width


def steps_of(items, batch_size, epochs, accumulate):
    return epochs * math.ceil(math.ceil(items / batch_size) / accumulate)


def first_that_learns(stages):
    return next((name for name, learns, draws in stages if learns or draws), None)
