def company_matters(model, batch):
    with own_modes(model), torch.no_grad():
        model.eval()
        together = model(batch).predictions
        alone = [model(batch[[i]]).predictions for i in range(len(batch))]
    return max(
        float((torch.cat([a[task] for a in alone]) - p).abs().max()) for task, p in together.items()
    )


def strict(metric):
    def wrapped(predictions, targets):
        if not all(p.isfinite().all() for p in predictions.values()):
            raise ValueError("a prediction is not finite")
        return metric(predictions, targets)

    return wrapped


def share_of_noise(train, model, seeds):
    moves = []
    for seed in seeds:
        copied = copy.deepcopy(model)
        train(copied, seed)
        moves.append(
            {
                n: (p - q).abs().mean()
                for (n, p), q in zip(copied.named_parameters(), model.parameters())
            }
        )
    each = {n: torch.stack([m[n] for m in moves]).detach() for n in moves[0]}
    return {n: float(v.std() / v.mean()) for n, v in each.items()}
