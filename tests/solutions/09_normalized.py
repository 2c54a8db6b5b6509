def rms_norm(x, gain, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def group_standardize(x, groups):
    done = torch.zeros_like(x)
    for k in groups.unique():
        part = x[groups == k].double()
        centred, sd = part - part.mean(0), part.std(0, correction=0)
        done[groups == k] = torch.where(sd > 1e-6, centred / sd.clamp(min=1e-6), 0).to(x.dtype)
    return done


def first_reach(history, threshold):
    values = history.values()
    return next(
        (i + 2 for i, pair in enumerate(zip(values, values[1:])) if max(pair) <= threshold),
        math.inf,
    )


def weighted_rmse(task, weight):
    def objective(output, batch):
        target = batch.targets[task]
        known = torch.isfinite(target)
        w = torch.where(known, weight(target.nan_to_num()), 0)
        error = torch.where(known, output.predictions[task] - target.nan_to_num(), 0)
        square = (w * error.square()).sum() / torch.where(known.any(), w.sum(), 1)
        return {"loss": torch.where(known.any(), (square + 1e-8).sqrt(), square)}

    return objective
