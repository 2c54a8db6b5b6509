def left_to_do(wanted, done):
    return [pair for pair in wanted if pair not in done]


def share_of(items, jobs):
    return [items[i::jobs] for i in range(jobs)]


def mean_difference(a, b):
    both = sorted(set(a) & set(b))
    return sum(a[s] - b[s] for s in both) / len(both) if both else None
