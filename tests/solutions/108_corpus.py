from mmemo.data.splits import speaker_split


def majority(data, task, train, test):
    y = data.targets[task]
    return (y[test] == torch.bincount(y[train]).argmax()).float().mean().item()


def balanced(data, task, seed):
    y, rng = data.targets[task].numpy(), np.random.default_rng(seed)
    fewest = np.unique(y, return_counts=True)[1].min()
    return rng.permutation(
        np.concatenate([rng.permutation(np.flatnonzero(y == c))[:fewest] for c in np.unique(y)])
    )


def nested(data, k, seed):
    for _, rest, test in speaker_folds(data, k, seed=seed):
        train, valid = speaker_split(data[rest], (0.75, 0.25), seed=seed)
        yield rest[train], rest[valid], test
