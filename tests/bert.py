"""Small BERTs with random weights, a text-only model around one, and answers for it to read."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

from mmemo.core.batch import Batch, Stream
from mmemo.models.base import ConcatFusion, Multimodal, Project, RegressionHead
from mmemo.models.text import TextEncoder

small = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)


def bert(layers=12, **options):
    return BertModel(
        BertConfig(
            **small
            | dict(num_hidden_layers=layers, vocab_size=50, max_position_embeddings=40)
            | options
        ),
        add_pooling_layer=False,
    )


def text_model(layers=3, dropout=0.1, encoder=None, **options):
    torch.manual_seed(0)
    encoder = encoder or TextEncoder(
        bert(layers, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **options)
    )
    return Multimodal(
        {"text": nn.Sequential(encoder, Project(encoder.width, 4))},
        ConcatFusion({"text": 4}, 8, dropout),
        {"y": RegressionHead(8)},
    )


def words(n=12, L=9, seed=0, vocabulary=50):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.randint(3, L + 1, (n, 1), generator=g)
    mask[0] = True
    return Batch(
        {
            "text": Stream(
                torch.randint(0, vocabulary, (n, L), generator=g), mask, torch.zeros(n, L)
            )
        },
        {"y": torch.randn(n, generator=g)},
    )
