def korthikanti(s, b, h, a):
    return s * b * h * (34 + 5 * a * s / h)


def smallest_accumulation(model, objective, batch, limit):
    n = 1
    while n <= len(batch):
        if (
            predicted_memory(
                model, objective, batch, Plan(batch_size=-(-len(batch) // n), accumulate=n)
            ).total
            <= limit
        ):
            return n
        n *= 2
    return None
