def talk_share(turns):
    spoken = [
        (t["stop"] - t["start"]) * np.array([t["speaker"] == "Participant", 1]) for t in turns
    ]
    own, all_ = np.sum(spoken, axis=0) if turns else (0, 0)
    return own / all_ if all_ else 0


def response_times(turns):
    return [
        b["start"] - a["stop"]
        for a, b in zip(turns, turns[1:])
        if a["speaker"] == "Ellie" and b["speaker"] == "Participant"
    ]


def f1_of_depressed(predicted, truth):
    p, y = predicted[truth >= 0] == 1, truth[truth >= 0] == 1
    hits = (p & y).sum().item()
    return 2 * hits / max(1, (p.sum() + y.sum()).item())
