def differs(a, b, at=""):
    found = []
    for key in sorted(set(a) | set(b)):
        x, y, path = a.get(key), b.get(key), f"{at}{key}"
        if isinstance(x, dict) and isinstance(y, dict):
            found += differs(x, y, path + ".")
        elif key not in a or key not in b or x != y:
            found.append(path)
    return found
