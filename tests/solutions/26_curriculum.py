def first_epoch(rank, epochs, start=0.3):
    return max(0, math.ceil((epochs - 1) * (rank**2 - start**2) / (1 - start**2)))


def self_paced(losses, share):
    mask = torch.zeros(len(losses), dtype=torch.bool)
    mask[losses.argsort()[: math.ceil(share * len(losses))]] = True
    return mask


def disagreement(votes):
    share = votes / votes.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1)


def forgettings(right):
    return (right[:-1] & ~right[1:]).sum(0)
