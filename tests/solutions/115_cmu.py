def unpad(x):
    return Stream.of(x, mask=(x != 0).any(-1), rate=1)
