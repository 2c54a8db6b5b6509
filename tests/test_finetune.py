"""Rates by depth, thaws that survive resume, processes and compilation, frozen norms,
and checkpointing.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from bert import bert, small, text_model, words
from tiny import MEMORY, Kill, Killed, Tiny, assert_same_run, fit_in, items, run, same, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from mmemo.core.errors import ConfigError
from mmemo.core.state import epoch_order
from mmemo.models.base import ConcatFusion, Frozen, Multimodal, RegressionHead
from mmemo.models.lora import add_lora
from mmemo.models.temporal import TCN
from mmemo.models.text import TextEncoder
from mmemo.training.checkpoint import list_checkpoints
from mmemo.training.finetune import (
    FrozenNorm,
    Thaw,
    checkpoint_gradients,
    freeze_norms,
    layer_rates,
    parameter_depths,
)
from mmemo.training.history import History
from mmemo.training.loop import Hooks, fit
from mmemo.training.memory import predicted_memory
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan, cut_updates, parameter_groups
from mmemo.training.tracking import QUIET, Tracking

HERE = Path(__file__).parent
TRAIN, VALID = items(44), items(20, seed=1)
quiet = dict(progress=False, track=())
speech = dict(
    **small,
    conv_dim=(8, 8),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def family():
    "One of each: (model, what a layer's parameters begin with, layers)."
    return {
        "bert": (bert(), "encoder.layer", 12),
        "distilbert": (
            DistilBertModel(
                DistilBertConfig(dim=16, n_heads=2, hidden_dim=24, n_layers=11, vocab_size=50)
            ),
            "transformer.layer",
            11,
        ),
        "roberta": (
            RobertaModel(RobertaConfig(**small, num_hidden_layers=12, vocab_size=50)),
            "encoder.layer",
            12,
        ),
        "wav2vec2": (
            Wav2Vec2Model(Wav2Vec2Config(**speech, num_hidden_layers=12)),
            "encoder.layers",
            12,
        ),
        "vit": (
            ViTModel(
                ViTConfig(**small, num_hidden_layers=12, image_size=8, patch_size=4),
                add_pooling_layer=False,
            ),
            None,
            12,
        ),
    }


class Inner(nn.Module):
    "As the encoders of the series are: the model is called `model`."

    def __init__(self, model):
        super().__init__()
        self.model = model


def around(**encoders):
    return Multimodal(
        {k: nn.Sequential(Inner(m), nn.Linear(16, 4)) for k, m in encoders.items()},
        ConcatFusion(dict.fromkeys(encoders, 4), 8),
        {"y": RegressionHead(8)},
    )


# --- rates by depth


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "wav2vec2", "vit"])
def test_every_layer_has_its_rate_and_every_parameter_one_pattern(name):
    part, layers, n = family()[name]
    model = around(x=part)
    if layers is None:
        layers = next(
            k for k, m in part.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n
        )
    rates = layer_rates(model, 1e-2, 0.5, 1.0)
    base = {k: g["base"] for g in parameter_groups(model, Plan(lr=rates)) for k in g["names"]}
    names = [k for k, _ in part.named_parameters()]
    last = max(i for i, k in enumerate(names) if k.startswith(f"{layers}."))
    for i, k in enumerate(names):
        depth = (
            n - int(k.removeprefix(f"{layers}.").split(".")[0])
            if k.startswith(f"{layers}.")
            else 1
            if i > last
            else n + 1
        )
        assert base[f"encoders.x.0.model.{k}"] == pytest.approx(1e-2 * 0.5 ** (depth - 1)), k
    assert {v for k, v in base.items() if not k.startswith("encoders.x.0.")} == {1.0}
    # no order of the patterns matters
    backwards = parameter_groups(model, Plan(lr=dict(reversed(rates.items()))))
    assert {k: g["base"] for g in backwards for k in g["names"]} == base


def test_encoders_of_different_depth_end_together():
    found = parameter_depths(around(a=bert(3), b=bert(11)))
    assert (
        found["encoders.a.0.model.encoder.layer.2.*"]
        == found["encoders.b.0.model.encoder.layer.10.*"]
        == 1
    )
    assert (
        found["encoders.a.0.model.embeddings.*"],
        found["encoders.b.0.model.embeddings.*"],
        found["encoders.b.0.model.encoder.layer.1.*"],
    ) == (4, 12, 10)
    assert parameter_depths(bert(2)) == {
        "encoder.layer.1.*": 1,
        "encoder.layer.0.*": 2,
        "embeddings.*": 3,
    }


def test_rates_with_an_adapter_and_without_new_rate():
    model = text_model(encoder=add_lora(TextEncoder(bert(12)), targets=["query"]))
    base = {
        k: g["base"]
        for g in parameter_groups(model, Plan(lr=layer_rates(model, 1e-3, 0.5)))
        for k in g["names"]
    }
    for layer in (1, 11):
        assert {v for k, v in base.items() if f".layer.{layer}." in k} == {
            1e-3 * 0.5 ** (11 - layer)
        }
    assert base["heads.y.linear.weight"] == 1e-3


def test_what_has_no_layers_is_named():
    with pytest.raises(ConfigError, match="say the patterns yourself"):
        layer_rates(tiny(), 1e-3)
    with pytest.raises(ConfigError, match="BertModel.*no stack"):
        parameter_depths(around(x=bert(1)))
    with pytest.raises(ConfigError, match="decay=0"):
        layer_rates(around(x=bert(2)), 1e-3, decay=0)


# --- thaw

STAGES = [["head.*"], ["norm.*"], ["*"]]


def test_thaw_is_a_function_of_the_epoch():
    model, thaw = tiny(), Thaw(STAGES, at=[0, 2, 3])

    def learns():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    seen = {}
    for epoch in (3, 0, 2, 1, 9):
        thaw(model, epoch)
        seen[epoch] = learns()
    head, norm = {"head.weight", "head.bias"}, {"norm.weight", "norm.bias"}
    assert seen == {
        0: head,
        1: head,
        2: head | norm,
        3: head | norm | {"encoder.weight", "encoder.bias"},
        9: set(dict(model.named_parameters())),
    }
    assert Thaw(STAGES, every=2).at == [0, 2, 4]
    model.encoder.requires_grad_(False)
    Thaw([["head.*"], "norm.*"])(model, 5)
    assert learns() == head | norm  # what no stage names stays as it is


def test_gradual_goes_from_the_head_down():
    model = around(a=bert(2), b=bert(3))
    thaw = Thaw.gradual(model, every=2)
    stage = {n: thaw.stage(n) for n, _ in model.named_parameters()}
    assert stage["heads.y.linear.bias"] == stage["encoders.a.1.weight"] == 0 and thaw.at == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert {stage[n] for n in stage if "a.0.model.embeddings" in n} == {3} and {
        stage[n] for n in stage if "b.0.model.encoder.layer.2." in n
    } == {1}


def test_thaws_that_cannot_be():
    with pytest.raises(ConfigError, match="2 epochs for 3 stages"):
        Thaw(STAGES, at=[0, 1])
    with pytest.raises(ConfigError, match="whole numbers"):
        Thaw(STAGES, at=[0, 1, -2])
    with pytest.raises(ConfigError, match=r"stage 1 of the thaw, \['hed.\*'\]"):
        Thaw([["encoder.*"], ["hed.*"]])(tiny(), 0)
    with pytest.raises(ConfigError, match="nothing learns in epoch 1: the first stage begins at 2"):
        Thaw(["*"], at=[2])(tiny(), 1)
    model = Multimodal(
        {"audio": Frozen(nn.Linear(3, 4))}, ConcatFusion({"audio": 4}, 8), {"y": RegressionHead(8)}
    )
    with pytest.raises(ConfigError, match="encoders.audio.module.weight lies inside a Frozen"):
        Thaw([["heads.*"], ["*"]])(model, 0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_thaw_in_fit_is_the_bare_loop_with_it(kind):
    """No gradient, no decay and no step for what is frozen; moments that begin with the thaw; one
    schedule throughout.
    """
    plan = Plan(epochs=4, batch_size=8, lr=1e-2, optimiser=kind, weight_decay=0.3, clip=None)
    a, b, thaw = tiny(dropout=0), tiny(dropout=0), Thaw(STAGES)
    start, marks = {k: p.detach().clone() for k, p in a.named_parameters()}, []

    def watch(model, epoch):
        marks.append({k for k, p in model.named_parameters() if not torch.equal(p, start[k])})
        thaw(model, epoch)

    history = fit(a, mse("y"), TRAIN, None, plan, tracking=QUIET, hooks=Hooks(at_epoch=watch))
    made = [
        {"params": g["params"], "weight_decay": g["weight_decay"]}
        for g in parameter_groups(b, plan)
    ]
    optimiser = (
        torch.optim.AdamW(made, lr=1e-2, fused=True)
        if kind == "adamw"
        else torch.optim.SGD(made, lr=1e-2, momentum=0.9)
    )
    losses = []
    for epoch in range(4):
        thaw(b, epoch)
        for [rows] in cut_updates(epoch_order(len(TRAIN), 0, epoch), plan):
            loss = mse("y")(b(TRAIN[rows]), TRAIN[rows])["loss"]
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert [s["loss"] for s in history.steps] == losses and same(a, b)
    assert [len(m) for m in marks] == [0, 2, 4, 6] and {s["lr"] for s in history.steps} == {1e-2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "precision": "bf16", "schedule": "warmup_linear"},
        {"compile": "aot_eager", "schedule": "onecycle"},
    ],
    ids=["plain", "accumulated", "compiled"],
)
def test_killed_around_every_thaw_and_resumed_it_is_the_same_run(tmp_path, options):
    plan, thaw = (
        Plan(**dict(epochs=4, batch_size=8, checkpoint_steps=2, lr=0.01) | options),
        Thaw(STAGES),
    )
    whole = tiny()
    want = (
        whole,
        fit(whole, mse("y"), TRAIN, VALID, plan, tracking=QUIET, hooks=Hooks(at_epoch=thaw)),
    )
    for at in (8, 15, 23) if "compile" not in options else (13,):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            fit_in(
                folder,
                tiny(),
                plan,
                Kill(at),
                at_epoch=Thaw(STAGES),
            )
        model = tiny(seed=9)
        assert_same_run(
            want,
            fit_in(
                folder,
                model,
                plan,
                at_epoch=Thaw(STAGES),
            ),
        )
        assert_same_run(want, (model, History.load(folder)))
    optimiser = folder / "checkpoints"
    assert len(list_checkpoints(optimiser)) > 0


def test_two_processes_average_what_is_thawed(tmp_path):
    """A wrapper made before a thaw would leave the gradients of what it thaws to each process
    alone, and the losses would part.
    """
    plan = dict(
        epochs=4,
        batch_size=7,
        dropout=0.0,
        norm=False,
        lr=1e-2,
        schedule="onecycle",
        accumulate=2,
        thaw=STAGES,
    )
    run(tmp_path / "one-0", dict(plan), tmp_path / "one-0.json")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "tiny.py"),
            str(tmp_path / "two"),
            json.dumps([plan]),
        ],
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{n}-0.json").read_text()) for n in ("one", "two"))
    assert (
        History.load(tmp_path / "two-0").runs[0]["about"]["processes"] == 2
        and len(two["losses"]) == 24
    )
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)


def test_frozen_layers_cost_less():
    "A stage costs more than the one before it: in operations, and in memory."
    model, batch, costs = text_model(), words(), []
    thaw = Thaw.gradual(model)
    for epoch in range(5):
        thaw(model, epoch)
        with FlopCounterMode(display=False) as counter:
            mse("y")(model.train()(batch), batch)["loss"].backward()
        costs.append((counter.get_total_flops(), predicted_memory(model, mse("y"), batch)))
        model.zero_grad()
    assert (
        all(a[0] < b[0] and a[1].moments < b[1].moments for a, b in zip(costs, costs[1:]))
        and costs[0][0] < 0.4 * costs[-1][0]
    )
    assert costs[0][1].activations < 0.5 * costs[-1][1].activations


# --- compiled


def test_compiled_and_plain_take_turns(tmp_path):
    """The names of weights are the same, a break in the graph is no error, and a run may go on
    compiled or not.
    """

    class Breaking(Tiny):
        def forward(self, batch):
            assert batch.targets["y"].sum().item() > -1e9  # a value, which no graph holds
            return super().forward(batch)

    def make():
        torch.manual_seed(0)
        return Breaking()

    plain, plan = make(), Plan(epochs=2, batch_size=22, lr=0.01)
    want = fit(plain, mse("y"), TRAIN, VALID, plan, tracking=QUIET)
    model = make()
    fit(
        model,
        mse("y"),
        TRAIN,
        VALID,
        Plan(epochs=1, batch_size=22, lr=0.01),
        tracking=Tracking(tmp_path, **quiet),
    )
    with pytest.warns(UserWarning, match="compile None is now aot_eager"):
        found = fit(
            model,
            mse("y"),
            TRAIN,
            VALID,
            Plan(epochs=2, batch_size=22, lr=0.01, compile="aot_eager"),
            tracking=Tracking(tmp_path, **quiet),
        )
    assert list(model.state_dict()) == list(plain.state_dict()) and type(model) is Breaking
    assert [s["loss"] for s in found.steps] == pytest.approx(
        [s["loss"] for s in want.steps], rel=1e-6
    )


def test_no_compiler_is_one_error(monkeypatch):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with (
            config.patch({"cpp.cxx": ("/no/such/compiler",)}),
            pytest.raises(ConfigError, match=r"compile=True needs a C\+\+ compiler.*compile=False"),
        ):
            fit(tiny(), mse("y"), TRAIN, plan=Plan(compile=True), tracking=QUIET)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(
        ConfigError,
        match="compile='inductr' cannot be: choose one of False, True, eager, aot_eager",
    ):
        Plan(compile="inductr")


# --- norms that stay frozen


@pytest.mark.parametrize(
    "kind, shape",
    [
        (nn.BatchNorm1d, (5, 7)),
        (nn.BatchNorm1d, (5, 7, 3)),
        (nn.BatchNorm2d, (5, 7, 3, 4)),
        (nn.BatchNorm3d, (2, 7, 3, 4, 2)),
    ],
)
def test_a_frozen_norm_is_the_norm_in_evaluation(kind, shape):
    from torchvision.ops import FrozenBatchNorm2d

    norm = kind(7)
    for _ in range(3):
        norm(torch.randn(shape) * 3 + 1)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(shape)
    model = freeze_norms(nn.Sequential(copy.deepcopy(norm))).train()
    assert (
        torch.equal(model(x), norm.eval()(x))
        and not list(model.parameters())
        and not model[0].training
    )
    assert list(model.state_dict()) == [f"0.{k}" for k in norm.state_dict()] and torch.equal(
        model[0].running_mean, norm.running_mean
    )
    model.load_state_dict({f"0.{k}": v for k, v in norm.state_dict().items()})
    if len(shape) == 4:
        theirs = FrozenBatchNorm2d(7)
        theirs.load_state_dict(norm.state_dict())
        assert torch.allclose(model(x), theirs(x), atol=1e-5)


def test_frozen_norms_do_not_move_in_fit():
    model = freeze_norms(tiny())
    before = copy.deepcopy(model.norm.state_dict())
    fit(
        model,
        mse("y"),
        TRAIN,
        VALID,
        Plan(epochs=2, batch_size=8, lr=0.1, weight_decay=0.5),
        tracking=QUIET,
        hooks=Hooks(at_epoch=Thaw(["head.*", "encoder.*"])),
    )
    assert all(torch.equal(v, before[k]) for k, v in model.norm.state_dict().items())
    inside, twice = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
    model = freeze_norms(nn.ModuleDict({"a": twice, "b": twice, "c": nn.Sequential(inside)}))
    assert (
        model["a"] is model["b"]
        and isinstance(model["c"][0], FrozenNorm)
        and model["a"].weight is None
    )
    with pytest.raises(ConfigError, match="no statistics"):
        freeze_norms(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(ConfigError, match="is a BatchNorm itself"):
        freeze_norms(nn.BatchNorm1d(4))


# --- checkpointing


class Stacked(nn.Module):
    "A stack of blocks with dropout and BatchNorm, and one of our own."

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU())
                for _ in range(3)
            )
        )
        self.tcn, self.head = TCN(6, 8, 3), nn.Linear(8, 1)

    def forward(self, batch):
        s = batch.streams["audio"]
        x = self.blocks(s.x.flatten(0, 1)).unflatten(0, s.x.shape[:2])
        return self.head(self.tcn(s.with_x(x)).x.mean(1))[:, 0]


def gradients(model, batch):
    torch.manual_seed(5)
    out = model.train()(batch)
    (out if isinstance(out, torch.Tensor) else out.predictions["y"]).square().mean().backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters()} | {
        k: b.clone() for k, b in model.named_buffers()
    }
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["bert", "own"])
def test_checkpointing_changes_nothing_but_memory(kind):
    torch.manual_seed(0)
    model, batch = (text_model(), words()) if kind == "bert" else (Stacked(), items(9))
    other, keys = copy.deepcopy(model), list(model.state_dict())
    want, names = gradients(model, batch), checkpoint_gradients(other)
    assert len(names) == (3 if kind == "bert" else 6) and list(other.state_dict()) == keys
    for net in (other, copy.deepcopy(other)):
        found = gradients(net, batch)
        net.load_state_dict(model.state_dict() if net is not other else net.state_dict())
        if net is other:
            assert all(torch.equal(v, found[k]) for k, v in want.items())
    assert checkpoint_gradients(other, on=False) == [] and all(
        "forward" not in vars(m) for m in other.modules()
    )
    assert checkpoint_gradients(copy.deepcopy(model)) == names


def test_a_copy_computes_its_own_blocks_again():
    torch.manual_seed(0)
    model = Stacked()
    checkpoint_gradients(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(
        g.abs().sum() > 0 for k, g in gradients(other, items(9)).items() if k == "blocks.0.0.weight"
    )


def test_nothing_to_checkpoint():
    with pytest.raises(ConfigError, match="nothing to checkpoint"):
        checkpoint_gradients(tiny())


# --- memory
