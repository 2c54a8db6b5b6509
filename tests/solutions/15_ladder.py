from mmemo.models.lora import count_trainable


def without(rung, modality):
    def build(train, text, width):
        return rung.build(
            Batch(
                {n: s for n, s in train.streams.items() if n != modality}, train.targets, train.meta
            ),
            text,
            width,
        )

    return replace(rung, build=build)


def learning_rungs(views, text):
    def build(rung):
        return rung.build(views[rung.view]["train"], text, rung.width).encoders["text"]

    parts = {
        name: [m for m in build(rung).modules() if isinstance(m, TextEncoder)]
        for name, rung in RUNGS.items()
    }
    return [name for name, found in parts.items() if any(count_trainable(m)[0] for m in found)]


def opened(rungs):
    found, before = {}, set()
    for name, rung in rungs.items():
        found[name] = set(rung.hears) - before
        before |= set(rung.hears)
    return found
