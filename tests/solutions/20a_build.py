import math, os
from pathlib import Path

def lora_count(layers, width, targets, rank):
    return layers * targets * 2 * rank * width

def whole_or_nothing(path, text):
    part = Path(path).with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)

def steps_of(items, batch_size, epochs, accumulate):
    return epochs * math.ceil(math.ceil(items / batch_size) / accumulate)
