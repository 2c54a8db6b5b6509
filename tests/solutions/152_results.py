def pooled_accuracy(folds):
    every = [said == right for fold in folds for said, right in fold]
    return sum(every) / len(every)


def leave_out(sessions):
    return [
        (
            [i for i, s in enumerate(sessions) if s != out],
            [i for i, s in enumerate(sessions) if s == out],
        )
        for out in sorted(set(sessions))
    ]
