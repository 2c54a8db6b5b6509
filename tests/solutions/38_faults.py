import torch


def overflowed(function, x):
    return not bool(torch.isfinite(function(x)).all()) and bool(
        torch.isfinite(function(x.double())).all()
    )


def blame(parents, creates, end):
    wanted, reached = [end], set()
    while wanted:
        if (k := wanted.pop()) not in reached:
            reached.add(k)
            wanted += parents[k]
    return min(reached & set(creates), default=None)
