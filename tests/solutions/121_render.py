def at_pitch(item, hz):
    "The item with F0 at `hz` in every real frame, all else the same."
    audio = item.streams["audio"]
    x = audio.x.clone()
    x[..., COVAREP.index("F0")] = torch.where(audio.mask, torch.tensor(hz, dtype=x.dtype), 0)
    return item.replace(audio=audio.with_x(x))


def pitch_of(wave, rate=16000, low=60, high=400):
    "Pitch in Hz of a steady tone [N] by autocorrelation."
    lags = np.arange(round(rate / high), round(rate / low) + 1)
    # the sum shrinks with the lag, so the first period wins over its multiples
    likeness = [np.dot(wave[:-lag], wave[lag:]) for lag in lags]
    return rate / lags[int(np.argmax(likeness))]


def emphasis_of(item):
    "+1 or -1, from the sound alone and the cue's position."
    level = loudness(item)
    return 1 if level[item.meta["cue"][0]] > np.median(level) else -1


def smile_of(points):
    "How far [T] the mouth's corners stand above the middle of its upper lip, in mm."
    return points[:, 51, 1] - points[:, [48, 54], 1].mean(1)
