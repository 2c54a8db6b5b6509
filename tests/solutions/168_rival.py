def shares_of(counts):
    total = counts.sum(1, keepdims=True)
    return counts / np.where(total > 0, total, 1)
