def smoothed(losses, beta):
    mean, found = 0.0, []
    for t, loss in enumerate(losses, 1):
        mean = beta * mean + (1 - beta) * loss
        found.append(mean / (1 - beta**t))
    return found
