"""The memory of an update: predicted against what the allocator saw."""

import copy

import pytest
import torch
from bert import bert, text_model, words
from tiny import Tiny, items, tiny
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.models.base import Multimodal
from mmemo.models.lora import add_lora
from mmemo.models.text import TextEncoder
from mmemo.training.finetune import checkpoint_gradients
from mmemo.training.memory import Memory, measured_memory, predicted_memory
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan

TRAIN = items(44)


ROWS = {
    "full": {},
    "checkpointed": {},
    "frozen": {},
    "lora": {},
    "bf16": dict(precision="bf16"),
    "accumulated": dict(batch_size=6, accumulate=4),
    "sgd": dict(optimiser="sgd"),
}


@pytest.mark.parametrize("name", ROWS)
def test_predicted_is_what_the_allocator_saw(name):
    torch.manual_seed(0)
    encoder = TextEncoder(bert(4, hidden_size=64, num_attention_heads=4, intermediate_size=256))
    model = text_model(
        encoder=add_lora(encoder, targets=["query", "value"]) if name == "lora" else encoder
    )
    if name == "frozen":
        encoder.requires_grad_(False)
    if name == "checkpointed":
        checkpoint_gradients(model)
    batch, plan = words(24, 33), Plan(**{"batch_size": 24} | ROWS[name])
    state, world = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    found = predicted_memory(model.eval(), mse("y"), batch, plan)
    assert (
        not model.training
        and torch.equal(world, torch.random.get_rng_state())
        and all(p.grad is None for p in model.parameters())
    )
    cost = measured_memory(model, mse("y"), batch, plan, updates=2)
    assert found.total == pytest.approx(cost.bytes, rel=0.02) and cost.seconds > 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (
        found.moments == learning * (1 if name == "sgd" else 2)
        and found.gradients <= learning < found.weights + 1
    )


def test_a_large_model_and_a_small_batch_peak_at_the_step():
    model = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, batch):
            return (
                Multimodal.__new__(Multimodal)
                if batch is None
                else type(
                    "O", (), {"predictions": {"y": self.net(batch.streams["audio"].x[:, 0])[:, 0]}}
                )()
            )

    batch = Batch({"audio": Stream.of(torch.randn(2, 1, 400), rate=1)}, {"y": torch.randn(2)})
    found, size = (
        predicted_memory(Net(), mse("y"), batch),
        sum(p.numel() for p in model.parameters()) * 4,
    )
    assert (
        found == Memory(size, size, 2 * size, 0)
        or found.gradients + found.activations < 1.01 * size
    )
    assert found.total == pytest.approx(
        measured_memory(Net(), mse("y"), batch, updates=2).bytes, rel=0.02
    )


def test_what_asks_for_values_cannot_be_predicted():
    class Asks(Tiny):
        def forward(self, batch):
            if batch.streams["audio"].x.sum() > 0:
                pass
            return super().forward(batch)

    with pytest.raises(ConfigError, match="asks for values.*measure instead"):
        predicted_memory(Asks(), mse("y"), TRAIN)
    with pytest.raises(ConfigError, match="updates=1"):
        measured_memory(tiny(), mse("y"), TRAIN, updates=1)
