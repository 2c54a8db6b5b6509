def chain(stages):
    def at_epoch(model, epoch):
        for name, p in model.named_parameters():
            p.requires_grad_(
                epoch >= len(stages) or any(fnmatchcase(name, pattern) for pattern in stages[epoch])
            )

    return at_epoch
