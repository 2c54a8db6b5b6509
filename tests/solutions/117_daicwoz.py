def f1_of_depressed(predicted, truth):
    known = truth >= 0
    p, y = predicted[known] == 1, truth[known] == 1
    hits = (p & y).sum().item()
    return 2 * hits / max(1, (p.sum() + y.sum()).item())
