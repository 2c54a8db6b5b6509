def depth_for(seconds, rate, kernel=3):
    blocks = 1
    while receptive_field(kernel, [2**i for i in range(blocks)]) / rate < seconds:
        blocks += 1
    return blocks


def holes(kernel, dilations):
    return receptive_field(kernel, dilations) - len(output_taps(kernel, dilations)[-1])


def masked_average_conv(x, mask, size):
    real = mask.unsqueeze(-1).to(x.dtype)

    def pool(v):
        return F.avg_pool1d(v.transpose(1, 2), size, 1, size // 2).transpose(1, 2) * size

    return pool(x.masked_fill(~mask.unsqueeze(-1), 0)) / pool(real).clamp(min=0.5)


def causal_conv(x, weight, bias, dilation):
    reach = (weight.shape[-1] - 1) * dilation
    return F.conv1d(
        F.pad(x.transpose(1, 2), (reach, 0)), weight, bias, dilation=dilation
    ).transpose(1, 2)
