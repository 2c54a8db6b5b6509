def by_name(wanted, there):
    place = {name: i for i, name in enumerate(there)}
    return [place[name] for name in wanted]


def relabel(labels, kept):
    place = {label: i for i, label in enumerate(kept)}
    return [place.get(label, -100) for label in labels]


def rounded(seconds):
    return [round(t, 4) for t in seconds]
