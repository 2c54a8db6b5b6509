from collections import Counter


def nearest(name, choices):
    return max(choices, key=lambda c: (Counter(name) & Counter(c)).total())


def strict(value, kind):
    return type(value) is kind


def divisor(width, heads):
    return next(h for h in range(heads, 0, -1) if width % h == 0)
