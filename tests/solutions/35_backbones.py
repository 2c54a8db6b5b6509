import torch


def receptive(kernels, strides):
    window, hop = 1, 1
    for kernel, stride in zip(kernels, strides):
        window, hop = window + (kernel - 1) * hop, hop * stride
    return window, hop


def masked_group_norm(x, lengths, eps):
    real = (torch.arange(x.shape[-1]) < lengths.unsqueeze(1)).unsqueeze(1)
    count = lengths.reshape(-1, 1, 1)
    centred = (x - (x * real).sum(-1, keepdim=True) / count) * real
    return centred / (centred.square().sum(-1, keepdim=True) / count + eps).sqrt()


def asked_most(maps, names):
    mean = maps.mean(1)
    others = ~torch.eye(len(names), dtype=torch.bool)
    asks = (mean.sum(-1) > 0).unsqueeze(-1) & others  # [B, M, M]: row asks column
    looked = (mean * asks).sum(1) / asks.sum(1).clamp(min=1)
    return [names[k] for k in looked.argmax(-1).tolist()]
