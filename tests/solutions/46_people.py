def earlier_mean(values, people):
    found = torch.zeros_like(values)
    for row, person in enumerate(people):
        earlier = torch.from_numpy(people[:row] == person)
        if earlier.any():
            found[row] = values[:row][earlier].mean(0)
    return found


def uses_only_own(take_away, values, people):
    before = take_away(values, people)
    for person in np.unique(people):
        own = torch.from_numpy(people == person)
        after = take_away(values + own[:, None].float(), people)
        if not torch.allclose(before[~own], after[~own]):
            return False
    return True
