def guilty(suspects, is_bad):
    return [s for s in suspects if is_bad({other for other in suspects if other != s})]
