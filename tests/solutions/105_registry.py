def taken(names, new):
    seen = set(names)
    for name in new:
        if name in seen:
            return name
        seen.add(name)
    return None
