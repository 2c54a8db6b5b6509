def worth_retrying(code, tries):
    return code not in (0, 2, 130) and tries < 3
