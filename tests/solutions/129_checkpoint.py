def damaged(folder):
    def bad(path):
        try:
            read_checkpoint(path)
        except CheckpointError:
            return True
        return False

    return [path.name for path in list_checkpoints(folder) if bad(path)]


def averaged(paths):
    parts = [read_checkpoint(path).tensors["weights"] for path in paths]

    def mean(name):
        return torch.stack([p[name] for p in parts]).mean(0)

    return {
        name: mean(name) if value.is_floating_point() else value
        for name, value in parts[-1].items()
    }
