def beside(one, other):
    return {i: torch.cat([v, other[i]]) for i, v in one.items() if i in other}


def coverage(features, ids, splits):
    return {
        s: sum(i in features for i, t in zip(ids, splits) if t == s) / splits.count(s)
        for s in dict.fromkeys(splits)
    }


def by_stem(features):
    found = {Path(i).stem: v for i, v in features.items()}
    if len(found) < len(features):
        raise DataError(
            f"{len(features)} ids become {len(found)}: files in different folders have one name"
        )
    return found
