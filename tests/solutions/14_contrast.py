def in_loss(z, labels, temperature=0.1):
    z = torch.nn.functional.normalize(z, dim=-1)
    own = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~own
    scores = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    share = scores - scores.logsumexp(1, keepdim=True)
    return -(share.masked_fill(~positive, -torch.inf).logsumexp(1) - positive.sum(1).log()).mean()


def alignment(z, labels):
    z = torch.nn.functional.normalize(z, dim=-1)
    pairs = torch.triu(labels[:, None] == labels, 1)
    return (2 - 2 * z @ z.T)[pairs].sum() / pairs.sum().clamp(min=1)
