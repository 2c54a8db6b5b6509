def worth(factor):
    rest = [f for f in LATENTS if f != factor]
    return (ceiling(rest) ** 2 - ceiling(LATENTS) ** 2) / ceiling(()) ** 2


def best_mae(noise):
    chance, values = _outcomes("phq8", Knobs(label_noise=noise))
    return float(
        np.mean([min((p * np.abs(values - guess)).sum() for guess in values) for p in chance])
    )


def linear_ceiling(hears):
    chance, values = _outcomes("phq8", Knobs())
    x = np.c_[np.ones(128), STATES[:, [LATENTS.index(f) for f in hears]]]
    guess = x @ np.linalg.lstsq(x, chance @ values, rcond=None)[0]
    return float(np.sqrt((chance * (values - guess[:, None]) ** 2).sum(1).mean()))
