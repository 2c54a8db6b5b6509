"Speakers with offsets of their own, as a batch: shared by the tests of speakers and protocols."

import torch

from mmemo.core.batch import Batch, Stream


def people(S=6, each=5, T=3, F=4, offset=0.0, seed=0, **meta):
    """S speakers in turn; session of two speakers, fold of three; each with an `offset` of their
    own on every feature.
    """
    g = torch.Generator().manual_seed(seed)
    n = S * each
    who = torch.arange(n) % S
    x = torch.randn(n, T, F, generator=g) + offset * torch.randn(S, F, generator=g)[who].unsqueeze(
        1
    )
    mask = torch.rand(n, T, generator=g) < 0.8
    mask[:, 0] = True
    return Batch(
        {"audio": Stream(x.masked_fill(~mask.unsqueeze(-1), 0), mask, torch.zeros(n, T))},
        {"phq8": torch.randn(n, generator=g)},
        {
            "id": [f"i{i}" for i in range(n)],
            "speaker": [f"s{w}" for w in who.tolist()],
            "session": [f"d{w // 2}" for w in who.tolist()],
            "fold": who % 3,
            "corpus": ["one"] * n,
            **meta,
        },
    )


def rows(data, *names):
    return [i for i, s in enumerate(data.meta["speaker"]) if s in names]
