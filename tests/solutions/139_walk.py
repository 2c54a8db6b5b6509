def linear_flops(shape, out):
    return 2 * math.prod(shape) * out


def attention_flops(B, L, H):
    return 4 * 2 * B * L * H * H + 2 * 2 * B * L * L * H


def bert_parameters(layers, width, vocabulary, positions=512):
    embeddings = (vocabulary + positions + 2) * width + 2 * width
    attention = 4 * (width * width + width) + 2 * width
    forward = 4 * width * width + 4 * width + 4 * width * width + width + 2 * width
    return embeddings + layers * (attention + forward) + width * width + width


def hears(walked, lane, seconds):
    for row in walked.rows:
        if (
            row.lane == lane
            and row.frames is not None
            and (math.isinf(row.frames) or (row.seconds or 0) >= seconds)
        ):
            return row.name
    return None
