def late(x):
    return x * 100
