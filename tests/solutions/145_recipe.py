import copy
import itertools


def patch(recipe, changes):
    made = copy.deepcopy(recipe)
    for path, value in changes.items():
        *way, last = path.split(".")
        here = made
        for key in way:
            here = here[key]
        if not isinstance(here, dict) or last not in here:
            raise KeyError(path)
        here[last] = value
    return made


def grid(changes):
    return [dict(zip(changes, values)) for values in itertools.product(*changes.values())]


def duplicate(text):
    seen = set()
    for line in text.splitlines():
        if ":" in line and not line.startswith(" "):
            key = line.split(":")[0]
            if key in seen:
                return key
            seen.add(key)
