"Models and corpora whose scores and X-rays are known: shared by the tests of both."

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.synthetic.factors import LATENTS, bayes_prediction, with_sarcasm
from mmemo.synthetic.knobs import Knobs

PLAIN = Knobs()


def listeners(n=800, per=20, seed=0, knobs=PLAIN, corpora=1):
    "A known-answer corpus without its signals: factors, speakers, labels, and streams of one step."
    rng = np.random.default_rng(seed)
    factors = torch.from_numpy(with_sarcasm(rng.choice([-1, 1], (n, 7)))).float()
    points = (
        bayes_prediction(factors, LATENTS, knobs=knobs)
        + torch.from_numpy(rng.standard_normal(n)).float()
    )

    def stream():
        return Stream(torch.zeros(n, 1, 2), torch.ones(n, 1, dtype=torch.bool), torch.zeros(n, 1))

    return Batch(
        {m: stream() for m in ("text", "audio", "video")},
        {"phq8": points.round().clip(0, 24)},
        {
            "factors": factors,
            "speaker": [f"s{i // per}" for i in range(n)],
            "corpus": [f"corpus{i // per % corpora}" for i in range(n)],
        },
    )


class Talker(nn.Module):
    "A model-shaped stand-in: one number, three classes and an embedding from the mean of a stream."

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.frozen = (
            nn.Linear(2, 5),
            nn.Dropout(0.5),
            nn.BatchNorm1d(5).eval(),
        )
        self.seen = []

    def forward(self, batch):
        self.seen.append((len(batch), self.training, torch.is_grad_enabled()))
        h = self.drop(self.frozen(self.body(batch.streams["audio"].x.mean(1))))
        return SimpleNamespace(
            predictions={"phq8": h[:, 0], "emotion": h[:, 1:4]}, embedding=h, maps={}
        )
