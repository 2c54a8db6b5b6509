def talk_share(turns):
    lengths = [turn["stop"] - turn["start"] for turn in turns]
    own = [long for long, turn in zip(lengths, turns) if turn["speaker"] == "Participant"]
    return sum(own) / sum(lengths) if lengths else 0


def response_times(turns):
    return [
        b["start"] - a["stop"]
        for a, b in zip(turns, turns[1:])
        if a["speaker"] == "Ellie" and b["speaker"] == "Participant"
    ]
