def differences(then, now):
    missing = object()
    return [key for key, value in now.items() if then.get(key, missing) != value]
