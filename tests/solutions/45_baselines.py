def most_frequent(train, count):
    return np.full(count, np.bincount(train).argmax())


def leave_two_out(people):
    names = np.unique(people)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            watch = np.isin(people, [one, other])
            yield np.flatnonzero(~watch), np.flatnonzero(watch)
