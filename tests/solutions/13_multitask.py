def adjusted(logits, prior):
    return logits - prior.log()


def uncertainty_weighted(losses, log_variance):
    return (torch.exp(-log_variance) * losses + log_variance).sum()
