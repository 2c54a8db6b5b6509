def centred(x, speakers):
    count = torch.bincount(speakers).unsqueeze(1)
    mean = torch.zeros(len(count), x.shape[1]).index_add(0, speakers, x) / count
    return x - mean[speakers]


def inside_out(inner, outer):
    gap = inner - outer
    return gap.mean(), gap.std()
