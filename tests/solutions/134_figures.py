def points(explained, base):
    return base * (1 - explained) ** 0.5


def row_shares(matrix):
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def wrong_side(ray, hears, tolerance=0.05):
    inside = {*hears, *(["sarcasm"] if {"words", "contour"} <= set(hears) else [])}
    return [
        k for k, i in ray.items() if k not in inside and (i[1] > tolerance or i[2] < -tolerance)
    ]
