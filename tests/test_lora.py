"""LoRA by hand against peft, merging, the peft path, adapters on disk."""

import copy
import json

import pytest
import torch
from torch import nn

from mmemo.core.batch import Stream
from mmemo.core.errors import CheckpointError, ConfigError, WeightsError
from mmemo.core.files import fingerprint_tensors
from mmemo.models.base import ConcatFusion, Multimodal, Project, RegressionHead, predict
from mmemo.models.lora import (
    LoRALinear,
    add_lora,
    count_trainable,
    draw_update,
    inject_lora,
    is_peft,
    linear_names,
    load_adapter,
    merge_adapter,
    merge_layers,
    save_adapter,
)
from mmemo.models.text import TextEncoder
from mmemo.synthetic.known_answer import known_answer


@pytest.fixture(scope="module")
def data():
    return known_answer(20, seed=2)


@pytest.fixture(scope="module")
def plain():
    return TextEncoder.pretrained("mmemo-tiny").eval()


def shaken(encoder: TextEncoder, seed: int = 3) -> TextEncoder:
    "An adapter that does something: B is no longer zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return encoder.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.subquery, self.inner = (
            nn.Linear(5, 7),
            nn.Linear(7, 7, bias=False),
            nn.Sequential(nn.Linear(7, 3)),
        )
        self.inner.value = nn.Linear(3, 4)

    def forward(self, x):
        return self.inner(self.subquery(self.query(x)).relu())


# ------------------------------------------------------------------ by hand
def test_the_update_is_what_the_paper_says():
    linear = nn.Linear(6, 4)
    x = torch.randn(2, 3, 6)
    layer = LoRALinear(linear, r=2, alpha=5)
    assert torch.equal(layer(x), linear(x))  # B = 0: training starts where the layer was
    assert (
        layer.A.shape == (2, 6)
        and layer.B.shape == (4, 2)
        and layer.A.abs().max() <= (1 / 6) ** 0.5
        and layer.A.std() > 0.1
    )
    nn.init.normal_(layer.B)
    W = linear.weight + 5 / 2 * layer.B @ layer.A
    assert torch.allclose(layer(x), x @ W.T + linear.bias, atol=1e-5)
    assert torch.linalg.matrix_rank(layer.merged().weight - linear.weight) == 2


def test_dropout_touches_the_update_only_and_only_in_training():
    layer = LoRALinear(nn.Linear(6, 4), r=2, dropout=0.5)
    x = torch.randn(50, 6)
    assert torch.equal(layer.train()(x), layer.linear(x))
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_inject_finds_whole_names_and_merge_undoes_it():
    net = Net()
    before, x = copy.deepcopy(net), torch.randn(3, 2, 5)
    assert inject_lora(net, ("query", "inner.value"), r=2) is net
    assert (
        isinstance(net.query, LoRALinear)
        and type(net.subquery) is nn.Linear
        and isinstance(net.inner.value, LoRALinear)
    )
    assert torch.equal(net(x), before(x)) and count_trainable(net) == (
        2 * (5 + 7) + 2 * (3 + 4),
        count_trainable(before)[1] + 38,
    )
    for layer in (net.query, net.inner.value):
        nn.init.normal_(layer.B)
    want = net(x)
    assert (
        merge_layers(net) is net
        and type(net.query) is nn.Linear
        and [n for n, _ in net.named_parameters()] == [n for n, _ in before.named_parameters()]
    )
    assert torch.allclose(net(x), want, atol=1e-5) and not torch.allclose(
        want, before(x), atol=1e-2
    )


def test_a_layer_used_twice_stays_one():
    net = nn.Module()
    net.query = nn.Linear(4, 4)
    net.other = nn.Module()
    net.other.query = net.query
    inject_lora(net, ["query"], r=1)
    assert net.query is net.other.query and count_trainable(net)[0] == 8
    merge_layers(net)
    assert net.query is net.other.query and type(net.query) is nn.Linear


def test_gradients_reach_a_and_b_and_nothing_else(data, plain):
    hand = inject_lora(copy.deepcopy(plain.model), r=3)
    hand.train()
    for m in hand.modules():
        if isinstance(m, LoRALinear):
            nn.init.normal_(m.B)
    TextEncoder(hand)(data.streams["text"]).x.square().sum().backward()
    for name, p in hand.named_parameters():
        assert p.requires_grad == name.endswith((".A", ".B")), name
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name


# ------------------------------------------------------------------ the oracle
@pytest.mark.parametrize(
    "targets", [("query", "value"), ("query", "key", "value", "dense"), ("attention.output.dense",)]
)
def test_by_hand_equals_peft_in_numbers_and_gradients(data, plain, targets):
    s = data.streams["text"]
    theirs = shaken(add_lora(plain, r=3, alpha=5, targets=targets)).double()
    hand = (
        TextEncoder(inject_lora(copy.deepcopy(plain.model), targets, r=3, alpha=5)).double().eval()
    )
    oracle = dict(theirs.model.base_model.model.named_modules())
    layers = {n: m for n, m in hand.model.named_modules() if isinstance(m, LoRALinear)}
    assert (
        set(layers) == {n for n, m in oracle.items() if hasattr(m, "lora_A")} and len(layers) >= 2
    )
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A.copy_(oracle[name].lora_A["default"].weight)
            layer.B.copy_(oracle[name].lora_B["default"].weight)
    weight = torch.randn(plain.width, dtype=torch.float64)
    for encoder in (hand, theirs):
        (encoder(s).x @ weight).square().sum().backward()
    assert torch.allclose(hand(s).x, theirs(s).x, rtol=0, atol=1e-12)
    for name, layer in layers.items():
        for mine, other in ((layer.A, oracle[name].lora_A), (layer.B, oracle[name].lora_B)):
            assert (
                torch.allclose(mine.grad, other["default"].weight.grad, rtol=1e-9, atol=1e-9)
                and mine.grad.abs().sum() > 0
            )
    assert count_trainable(hand) == count_trainable(theirs)
    assert torch.allclose(
        merge_adapter(theirs)(s).x, TextEncoder(merge_layers(hand.model))(s).x, rtol=0, atol=1e-12
    )


# ------------------------------------------------------------------ the peft path
def test_lora_leaves_the_encoder_alone_and_starts_where_it_was(data, plain):
    before, s = fingerprint_tensors(plain), data.streams["text"]
    tuned = add_lora(plain, r=4).eval()
    assert (
        is_peft(tuned)
        and not is_peft(plain)
        and fingerprint_tensors(plain) == before
        and count_trainable(plain)[0] == count_trainable(plain)[1]
    )
    assert tuned.width == plain.width and torch.equal(tuned(s).x, plain(s).x)
    # layers, targets, rank, A and B
    assert count_trainable(tuned) == (
        2 * 2 * 4 * 2 * plain.width,
        count_trainable(plain)[1] + 32 * plain.width,
    )
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n, _ in tuned.named_parameters() if "lora_" in n
    }


def test_default_targets_know_the_architectures():
    from transformers import (
        BertConfig,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        GPT2Config,
        GPT2Model,
        RobertaConfig,
        RobertaModel,
    )

    small = dict(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=9,
        vocab_size=11,
    )
    for model in (
        BertModel(BertConfig(**small)),
        RobertaModel(RobertaConfig(**small)),
        DistilBertModel(
            DistilBertConfig(dim=8, n_layers=3, n_heads=2, hidden_dim=9, vocab_size=11)
        ),
    ):
        assert count_trainable(add_lora(TextEncoder(model), r=2))[0] == 3 * 2 * 2 * (8 + 8)
    other = TextEncoder(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11)))
    with pytest.raises(ConfigError, match="no default targets for a 'gpt2'"):
        add_lora(other)


def model_for(encoder):
    torch.manual_seed(1)
    return Multimodal(
        {"text": nn.Sequential(encoder, Project(encoder.width, 6)), "audio": Project(74, 6)},
        ConcatFusion({"text": 6, "audio": 6}, 7),
        {"phq8": RegressionHead(7)},
    )


def test_merging_keeps_the_predictions_and_the_original(data, plain):
    tuned = shaken(add_lora(plain))
    s, before = data.streams["text"], fingerprint_tensors(tuned)
    one = merge_adapter(tuned)
    assert not is_peft(one) and fingerprint_tensors(tuned) == before
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    with torch.no_grad():
        assert (
            torch.allclose(one(s).x, tuned(s).x, atol=1e-5)
            and (one(s).x - plain(s).x).abs().max() > 0.1
        )


def test_padding_permutation_and_missing_text(data, plain):
    model = model_for(shaken(add_lora(plain))).eval()
    few = data[[0, 1, 2]]
    s = few.streams["text"]
    longer = few.replace(
        text=Stream(
            *(
                torch.cat([v, torch.full((3, 4), fill, dtype=v.dtype)], 1)
                for v, fill in ((s.x, 5), (s.mask, False), (s.t, 9))
            )
        )
    )
    want = predict(model, few)["phq8"]
    assert torch.allclose(want, predict(model, longer)["phq8"], atol=1e-5)
    assert torch.allclose(want[[2, 0, 1]], predict(model, few[[2, 0, 1]])["phq8"], atol=1e-5)
    gone = [predict(model, d.without("text"))["phq8"] for d in (few, longer)]
    assert torch.isfinite(gone[0]).all() and torch.equal(*gone)


def test_gradients_in_a_whole_model_with_a_missing_row(data, plain):
    model = model_for(shaken(add_lora(plain))).train()
    s = data.streams["text"]
    mask = s.mask.clone()
    mask[1] = False
    model(data.replace(text=Stream(s.x, mask, s.t))).predictions["phq8"].square().mean().backward()
    for name, p in model.named_parameters():
        learns = not name.startswith("encoders.text.0.") or "lora_" in name
        assert p.requires_grad == learns and (p.grad is not None) == learns, name
        assert not learns or torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


# ------------------------------------------------------------------ adapters on disk
def test_an_adapter_comes_back_bit_for_bit(data, plain, tmp_path):
    tuned = shaken(add_lora(plain, r=3, alpha=7, targets=("query", "attention.output.dense")))
    s = data.streams["text"]
    assert save_adapter(tuned, tmp_path / "a") == tmp_path / "a"
    assert (
        sorted(f.name for f in (tmp_path / "a").iterdir())
        == ["adapter_config.json", "adapter_model.safetensors"]
        and len(list(tmp_path.iterdir())) == 1
    )
    again = load_adapter(TextEncoder.pretrained(), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(again(s).x, tuned(s).x)
    assert count_trainable(again) == count_trainable(tuned) and not is_peft(plain)
    # no path of this machine
    assert (
        "/"
        not in json.loads((tmp_path / "a" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
    )
    save_adapter(shaken(add_lora(plain), 5), tmp_path / "a")  # a newer one takes its place
    assert count_trainable(load_adapter(plain, tmp_path / "a")) == count_trainable(add_lora(plain))


def test_peft_reads_ours_and_we_read_peft(data, plain, tmp_path):
    from peft import PeftModel

    tuned, s = shaken(add_lora(plain, r=3)), data.streams["text"]
    save_adapter(tuned, tmp_path / "ours")
    theirs = TextEncoder(
        PeftModel.from_pretrained(copy.deepcopy(plain.model), str(tmp_path / "ours"))
    ).eval()
    tuned.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with torch.no_grad():
        assert torch.equal(theirs(s).x, tuned(s).x) and torch.equal(
            load_adapter(plain, tmp_path / "theirs").eval()(s).x, tuned(s).x
        )


def test_an_adapter_that_is_not_there_or_does_not_fit(plain, tmp_path):
    with pytest.raises(
        WeightsError, match="no adapter_config.json and no adapter_model.safetensors"
    ):
        load_adapter(plain, tmp_path)
    (tmp_path / "pickled").mkdir()
    save_adapter(add_lora(plain), tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(WeightsError, match="no adapter_model.safetensors"):
        load_adapter(plain, tmp_path / "pickled")
    folder = save_adapter(add_lora(plain), tmp_path / "a")
    other = copy.deepcopy(plain)
    other.model.embeddings.word_embeddings.weight.data[7, 3] += 1
    with pytest.raises(WeightsError, match="trained on other weights"):
        load_adapter(other, folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"r": 5}, "size|shape"),
        ({"target_modules": ["key"]}, "on one side only"),
        ({"target_modules": ["nobody"]}, "does not fit"),
        ({"use_dora": True}, "sets use_dora"),
        ({"peft_type": "IA3"}, "sets peft_type"),
        ({"r": "x"}, "does not fit"),
    ],
)
def test_a_configuration_that_does_not_go_with_the_weights(plain, tmp_path, change, said):
    path = save_adapter(add_lora(plain), tmp_path / "a") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=said):
        load_adapter(plain, tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_refused(plain, tmp_path, name):
    path = save_adapter(shaken(add_lora(plain, r=1)), tmp_path / "a") / name
    whole = path.read_bytes()
    torn = [whole[:0], whole[: len(whole) // 2], whole[:-1], b"\xff" * 40]
    # one bit
    if name.endswith("safetensors"):
        torn += [whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:]]
    for data in torn:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            load_adapter(plain, tmp_path / "a")


def test_weights_that_are_not_finite_are_refused(plain, tmp_path):
    tuned = shaken(add_lora(plain, r=1))
    next(p for n, p in tuned.named_parameters() if "lora_B" in n).data[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(plain, save_adapter(tuned, tmp_path / "a"))


def test_a_folder_that_cannot_be_written(plain, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_adapter(add_lora(plain), tmp_path / "file")


# ------------------------------------------------------------------ bad inputs
def test_what_cannot_be_is_said_with_the_choices(plain, tmp_path):
    with pytest.raises(ConfigError, match="called queery; there are query, key, value, dense"):
        inject_lora(copy.deepcopy(plain.model), ("queery",))
    with pytest.raises(ConfigError, match=r"\['queery'\]; there are query, key"):
        add_lora(plain, targets=("query", "queery"))
    with pytest.raises(ConfigError, match="nothing"):
        add_lora(plain, targets=())
    with pytest.raises(ConfigError, match="there are none"):
        inject_lora(nn.Sequential(nn.ReLU()))
    for make in (lambda: LoRALinear(nn.Linear(3, 4), r=0), lambda: add_lora(plain, r=0)):
        with pytest.raises(ConfigError, match="rank r=0"):
            make()
    with pytest.raises(ConfigError, match="no LoRALinear"):
        merge_layers(Net())
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(add_lora(plain))
    with pytest.raises(ConfigError, match="has an adapter already"):
        load_adapter(add_lora(plain), save_adapter(add_lora(plain), tmp_path / "a"))
    for ask in (merge_adapter, lambda e: save_adapter(e, "nowhere")):
        with pytest.raises(ConfigError, match="no adapter"):
            ask(plain)
    assert linear_names(plain.model) == ["query", "key", "value", "dense"]


# ------------------------------------------------------------------ the picture
def test_the_picture_is_to_scale():
    import matplotlib.pyplot as plt

    ax = draw_update(30, 50, 4)
    areas = sorted(p.get_width() * p.get_height() for p in ax.patches)
    assert areas == [4 * 30, 4 * 50, 30 * 50] and ax.get_aspect() == 1
    assert "320 learn: 21.3%" in " ".join(t.get_text() for t in ax.texts)
    plt.close("all")
