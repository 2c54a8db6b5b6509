def emodb_name(name):
    emotions = {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear"}
    emotions |= {"F": "happiness", "T": "sadness", "N": "neutral"}
    found = re.fullmatch(r"(\d\d)([ab]\d\d)([WLEAFTN])([a-z])", name)
    if not found:
        raise DataError(f"{name!r} is not an EMO-DB name SSsssEv")
    speaker, sentence, emotion, version = found.groups()
    return {
        "speaker": speaker,
        "sentence": sentence,
        "emotion": emotions[emotion],
        "version": version,
    }
