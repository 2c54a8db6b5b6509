def seed_share(effects):
    S, P = effects.shape
    rows, columns, whole = effects.mean(1), effects.mean(0), effects.mean()
    by_seed = P * ((rows - whole) ** 2).sum() / (S - 1)
    by_person = S * ((columns - whole) ** 2).sum() / (P - 1)
    rest = ((effects - rows[:, None] - columns + whole) ** 2).sum() / ((S - 1) * (P - 1))
    seeds, people = max((by_seed - rest) / P, 0), max((by_person - rest) / S, 0)
    return seeds / (seeds + people + rest)


def seeds_wanted(seed_variance, person_variance, rest, people, error):
    left = error**2 - person_variance / people
    if left <= 0:
        return 1 if seed_variance + rest == 0 == left else None
    return max(1, math.ceil((seed_variance + rest / people) / left - 1e-9))
