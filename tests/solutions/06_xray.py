def mutters(ray):
    return [k for k, i in ray.items() if i.low > 0 and i.high < 1]
