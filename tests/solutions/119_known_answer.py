def hear_contour(data):
    s, seconds = data.streams["audio"], data.meta["seconds"][:, None]
    pitch = s.x[..., 0] - masked_mean(s.x, s.mask)[:, :1]
    return masked_mean(pitch * (2 * s.t / seconds - 1), s.mask).sign()


def hear_negation(data):
    def score(words):
        return sum(
            (1 if (words[i - 1] == "not") == (w in GOOD_WORDS) else -1)
            for i, w in enumerate(words)
            if w in GOOD_WORDS + BAD_WORDS
        )

    return torch.tensor([float(score(words)) for words in data.meta["words"]]).sign()


def hear_emphasis(data):
    s = data.streams["audio"]
    at = torch.tensor(
        [spans[cue].mean().item() for spans, cue in zip(data.meta["spans"], data.meta["cue"])]
    )[:, None]
    burst = s.x[..., 11] - masked_mean(s.x, s.mask)[:, 11:12]
    return masked_mean(burst * torch.exp(-0.5 * ((s.t - at) / 0.04) ** 2), s.mask).sign()
