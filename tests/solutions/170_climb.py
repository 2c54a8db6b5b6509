def next_training(rungs, seeds, ended, running):
    for rung in rungs:
        for seed in seeds:
            waits = rung not in ("static", "lora") and ("lora", seed) not in ended
            if (rung, seed) not in ended | running and not waits:
                return rung, seed
    return None
