def huber(task, delta):
    def objective(output, batch):
        target = batch.targets[task]
        known = torch.isfinite(target)
        error = torch.where(known, output.predictions[task] - target.nan_to_num(), 0).abs()
        each = torch.where(error <= delta, error.square() / 2, delta * (error - delta / 2))
        return {"loss": each.sum() / known.sum().clamp(min=1)}

    return objective


def balanced(labels, seed):
    classes = [torch.nonzero(labels == c).flatten().tolist() for c in labels.unique()]

    def sampler(epoch):
        rows = [
            own[i % len(own)]
            for k, own in enumerate(classes)
            for i in range((len(labels) + k) // len(classes))
        ]
        return [rows[i] for i in epoch_order(len(rows), seed, epoch)]

    return sampler


def epochs_until(history, share):
    best = history.best["valid"]["loss"]
    return next(e["epoch"] for e in history.epochs if e["valid"]["loss"] <= best * (1 + share))
