def random_folds(n, k, seed):
    order = np.random.default_rng(seed).permutation(n)
    for part in np.array_split(order, k):
        yield np.setdiff1d(order, part), part


def majority_f1(train, test, classes):
    guess = train.bincount(minlength=classes).argmax()
    share = (test == guess).float().mean().item()
    return share * 2 * share / (share + 1)
