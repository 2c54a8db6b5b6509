"""A key of what an object computes: it follows every change, is the same in every process, and
what cannot be described is refused by name.
"""

import dataclasses
import functools
import io
import logging
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.core.identity import NotDescribed, fingerprint_object
from mmemo.core.pieces import library_of, names_used
from mmemo.experiments.fold_training import keep_or_compute
from mmemo.models.cache import FeatureCache, encoder_identity
from mmemo.models.text import TextEncoder


class Holder(nn.Module):
    "An encoder that multiplies by whatever it holds."

    def __init__(self, **held):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        vars(self).update(held)

    def forward(self, s):
        return s.with_x(self.linear(s.x))


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    names: tuple = ("a",)


class Slotted:
    __slots__ = ("scale", "__hidden")

    def __init__(self, scale):
        self.scale, self.__hidden = scale, scale


class Nested:
    def __init__(self, scale):
        self.inner = {"options": [Options(scale)]}


def from_cell(text: str, name: str = "made", **scope):
    "What a notebook's cell defines under a name."
    space = {"__name__": "__main__", "nn": nn, "torch": torch, "F": F, **scope}
    exec(compile(text, "<cell>", "exec"), space)
    return space[name]


CELL = """
class Encoder(nn.Module):
    power = 2
    def forward(self, s):
        def inner(x):
            return x.abs() + 1e-3
        return s.with_x(helper(inner(s.x)) ** self.power)
def helper(x):
    return x * GAIN
GAIN = 1.0
made = Encoder()
"""


def cell(old="", new="", **scope):
    assert old in CELL
    return from_cell(CELL.replace(old, new) if old else CELL, **scope)


def hooked(hook, pre=False, **options):
    made = Holder()
    (made.register_forward_pre_hook if pre else made.register_forward_hook)(hook, **options)
    return made


def scaled_by(number):
    def hook(module, args, output):
        return output.with_x(output.x * number)

    return hook


def patched(forward, bound=True):
    made = Holder()
    made.forward = types.MethodType(forward, made) if bound else forward
    return made


def twice(self, s):
    return s.with_x(self.linear(s.x) * 2)


def thrice(self, s):
    return s.with_x(self.linear(s.x) * 3)


class Always(Holder):
    "Always in the mode that it was made with."

    def train(self, mode=True):
        return super().train(self.held)


def mode(training):
    made = Always(held=training)
    made.train()
    return made


def inside(**held):
    "An encoder deep in another one, in a list that torch does not know."
    return nn.Sequential(Holder(parts=[Holder(**held)]))


def hidden_buffer(value):
    made = Holder()
    made.register_buffer("window", torch.tensor(value), persistent=False)
    return made


def with_module(text):
    "An encoder whose function calls a module of the user's own."
    helpers = types.ModuleType("helpers_of_a_user")
    exec(text, vars(helpers))
    return Holder(act=from_cell("made = lambda x: helpers.scale(x)", helpers=helpers))


class Mine(dict):
    pass


# two encoders that compute, or might compute, something different
FOOLING = {
    "forward": (cell(), cell("x.abs() + 1e-3", "x.abs() - 1e-3")),
    "a nested function": (cell(), cell("+ 1e-3", "+ 1e-4")),
    "a helper function": (cell(), cell("return x * GAIN", "return x / GAIN")),
    "a global number": (cell(), cell("GAIN = 1.0", "GAIN = 2.0")),
    "a class attribute": (cell(), cell("power = 2", "power = 3")),
    "a function of a module": (
        with_module("def scale(x):\n    return x"),
        with_module("def scale(x):\n    return -x"),
    ),
    "a number of a module": (
        with_module("K = 1\ndef scale(x):\n    return x * K"),
        with_module("K = 2\ndef scale(x):\n    return x * K"),
    ),
    "an activation": (Holder(act=F.relu), Holder(act=F.gelu)),
    "a function of torch": (Holder(act=torch.sin), Holder(act=torch.cos)),
    "a partial": (
        Holder(act=functools.partial(F.leaky_relu, negative_slope=0.1)),
        Holder(act=functools.partial(F.leaky_relu, negative_slope=0.2)),
    ),
    "a lambda": (Holder(act=lambda x: x + 1), Holder(act=lambda x: x + 2)),
    "a default": (Holder(act=lambda x, k=1: x + k), Holder(act=lambda x, k=2: x + k)),
    "a closure": (Holder(act=scaled_by(1.0)), Holder(act=scaled_by(2.0))),
    "a tensor": (Holder(scale=torch.ones(2)), Holder(scale=torch.ones(2) * 2)),
    "the type of a tensor": (
        Holder(scale=torch.zeros(2)),
        Holder(scale=torch.zeros(2, dtype=torch.int32)),
    ),
    "a dictionary": (Holder(o={"k": 1}), Holder(o={"k": 2})),
    "a dictionary of one's own": (Holder(o=Mine(k=1)), Holder(o=Mine(k=2))),
    "a list": (Holder(o=[1, 2]), Holder(o=[2, 1])),
    "a list in a list": (Holder(o=[[1], 2]), Holder(o=[1, [2]])),
    "a set": (Holder(o={"a", "b"}), Holder(o={"a", "c"})),
    "a text": (Holder(o="1"), Holder(o=1)),
    "a number in its last digit": (Holder(o=0.1 + 0.2), Holder(o=0.3)),
    "a private number": (Holder(_scale=1.0), Holder(_scale=2.0)),
    "a private list": (Holder(_scale=[1.0]), Holder(_scale=[2.0])),
    "an array": (Holder(o=np.ones(2)), Holder(o=np.array([1, 2.0]))),
    "a scalar of NumPy": (Holder(o=np.float32(1)), Holder(o=np.float32(2))),
    "its type": (Holder(o=np.float32(1)), Holder(o=np.float64(1))),
    "a data class": (Holder(o=Options(1.0)), Holder(o=Options(2.0))),
    "slots": (Holder(o=Slotted(1)), Holder(o=Slotted(2))),
    "a nested object": (Holder(o=Nested(1.0)), Holder(o=Nested(2.0))),
    "a module that torch does not know": (inside(k=1), inside(k=2)),
    "a pattern": (Holder(o=re.compile("a")), Holder(o=re.compile("b"))),
    "a path": (Holder(o=Path("a")), Holder(o=Path("b"))),
    "a class": (Holder(o=nn.ReLU), Holder(o=nn.GELU)),
    "a hook": (Holder(), hooked(scaled_by(1.0))),
    "what a hook does": (hooked(scaled_by(1.0)), hooked(scaled_by(2.0))),
    "a pre-hook": (
        hooked(lambda module, args: args, pre=True),
        hooked(lambda module, args: None, pre=True),
    ),
    "what a hook is given": (
        hooked(lambda *told: None),
        hooked(lambda *told: None, with_kwargs=True),
    ),
    "a method": (Holder(), patched(twice)),
    "another method": (patched(twice), patched(thrice)),
    "a function in a method's place": (
        patched(lambda s: s, bound=False),
        patched(lambda s: s.zeroed(), bound=False),
    ),
    "a mode that eval() does not change": (mode(True), mode(False)),
    "a buffer that is not saved": (hidden_buffer(1.0), hidden_buffer(2.0)),
    "the order of parts": (
        nn.Sequential(nn.ReLU(), nn.Tanh()),
        nn.Sequential(nn.Tanh(), nn.ReLU()),
    ),
    "an option of a layer": (nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=2)),
}


@pytest.mark.parametrize("what", FOOLING)
def test_whatever_changes_the_output_changes_the_key(what):
    one, other = FOOLING[what]
    assert encoder_identity(one) == encoder_identity(one)
    named = {k for k, v in encoder_identity(one).items() if v != encoder_identity(other)[k]}
    assert named, what
    assert fingerprint_object(one) != fingerprint_object(other)


def test_the_cache_asks_an_edited_encoder_again(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = Batch({"audio": Stream.of(torch.randn(4, 5, 3, generator=g), rate=10)})
    cache, results = FeatureCache(tmp_path, progress=False), []
    for encoder in (cell(), cell("power = 2", "power = 3"), cell()):
        with pytest.MonkeyPatch.context(), np.testing.suppress_warnings() as quiet:
            quiet.filter(UserWarning)
            results.append(cache(encoder, data, "audio").streams["audio"].x)
    assert not torch.allclose(results[0], results[1]) and torch.equal(results[0], results[2])
    assert [line.split("; ")[1] for line in cache.report] == [
        "0 known, 4 computed",
        "0 known, 4 computed",
        "4 known, 0 computed",
    ]


def test_settings_of_torch_change_the_key():
    encoder = Holder()
    plain = encoder_identity(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder_identity(encoder)
    assert {k for k in plain if plain[k] != half[k]} == {"settings"}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert encoder_identity(encoder) != plain
    finally:
        torch.set_float32_matmul_precision(before)
    handle = nn.modules.module.register_module_forward_hook(scaled_by(3.0))
    try:
        assert encoder_identity(encoder) != plain
    finally:
        handle.remove()
    assert encoder_identity(encoder) == plain


SAME = {
    "other lines": lambda: from_cell("\n\n# a remark\n" + CELL),
    "another global": lambda: cell(data=object()),
    "numbers of hooks": lambda: (hooked(scaled_by(1.0)), cell())[1],
}


@pytest.mark.parametrize("how", SAME)
def test_what_does_not_change_the_output_is_the_same_key(how):
    assert encoder_identity(cell()) == encoder_identity(SAME[how]())


def test_state_that_is_saved_and_loaded_is_the_same_encoder(tmp_path):
    def made():
        torch.manual_seed(torch.seed() % 1000)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2))

    one, other = made(), made()
    assert encoder_identity(one) != encoder_identity(other)
    other.load_state_dict(one.state_dict())
    assert encoder_identity(one.train()) == encoder_identity(other.eval())
    assert one.training and not other.training
    # hooks are known by what they are, not by their numbers
    first, second = hooked(scaled_by(1.0)), hooked(scaled_by(1.0))
    assert list(first._forward_hooks) != list(second._forward_hooks)
    assert encoder_identity(first) == encoder_identity(second)


def test_a_compiled_encoder_is_known_by_the_module_in_it():
    def compiled(features):
        torch.manual_seed(0)
        return torch.compile(nn.Linear(3, features))

    assert encoder_identity(compiled(2)) == encoder_identity(compiled(2))
    assert encoder_identity(compiled(2)) != encoder_identity(compiled(3))


PROGRAM = """
import sys, torch
from torch import nn
from mmemo.experiments.fold_training import keep_or_compute
from mmemo.models.cache import encoder_identity
from mmemo.models.text import TextEncoder
from test_identity import Holder, Nested, Options, hooked, scaled_by, cell
made = [
    Holder(o={"a", "b", "c", "d"}, n=Nested(1.0), f=scaled_by(2.0), x=torch.ones(2)),
    hooked(scaled_by(1.0)), cell(), TextEncoder.pretrained("mmemo-tiny"),
]
print([sorted(encoder_identity(one).items()) for one in made])
"""


def test_another_process_says_the_same():
    said = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip().splitlines()[-1])
    assert said[0] == said[1]


def opened():
    return open(__file__)


REFUSED = {
    "a file": (lambda: {"log": opened()}, r"encoder\.front\.held\['log'\] is of type TextIO"),
    "a generator": (lambda: (x for x in "ab"), r"encoder\.front\.held is of type generator"),
    "a file of a function": (
        lambda: from_cell("made = lambda x: log.write(x)", log=opened()),
        r"encoder\.front\.held: global log\.write is of type TextIO",
    ),
    "a file of a closure": (
        lambda: (lambda file: lambda x: file.write(x))(opened()),
        r"encoder\.front\.held: file is of type TextIO",
    ),
    "a tensor without values": (
        lambda: torch.zeros(2, device="meta"),
        r"encoder\.front\.held is of type Tensor",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_described_is_refused_by_name(tmp_path, what):
    make, message = REFUSED[what]
    encoder = nn.Sequential()
    encoder.add_module("front", Holder(held=make()))
    data = Batch({"audio": Stream.of(torch.zeros(2, 2, 3), rate=10)})
    with pytest.raises(ConfigError, match=message) as error:
        FeatureCache(tmp_path, progress=False)(encoder, data, "audio")
    assert "use `precompute`" in str(error.value) and "`unkeyed`" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_recipe_computes_what_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    data = Batch({"audio": Stream.of(torch.ones(2, 2, 3), rate=10)})
    with pytest.warns(UserWarning, match="audio: encoder.log is of type TextIO"):
        done = keep_or_compute(False)(Holder(log=opened()), data, "audio")
    assert torch.equal(
        done.streams["audio"].x, keep_or_compute(False)(Holder(), data, "audio").streams["audio"].x
    )
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_attribute_that_its_class_names_is_left_out():
    class Counting(Holder):
        unkeyed = ("log", "calls")

    one, other = Counting(log=opened(), calls=1), Counting(log=opened(), calls=2)
    assert encoder_identity(one) == encoder_identity(other)
    assert encoder_identity(one) != encoder_identity(Counting(calls=1, more=1))


def test_objects_that_hold_each_other_and_libraries_are_described():
    one = Nested(1.0)
    one.inner["back"] = one
    deep = []
    for _ in range(50):
        deep = [deep]
    held = {
        "one": one,
        "deep": deep,
        "logger": logging.getLogger("a"),
        "cached": functools.cache(math.sqrt),
        "bytes": io.BytesIO(b"ab"),
        "generator": torch.Generator().manual_seed(1),
        "random": np.random.default_rng(0),
        "module": np,
        "device": torch.device("cpu"),
        "kind": list[int] | None,
    }
    assert fingerprint_object(held) == fingerprint_object(held)
    very_deep = []
    for _ in range(10**5):
        very_deep = [very_deep]
    with pytest.raises(NotDescribed):
        fingerprint_object(very_deep)


def test_names_and_libraries():
    assert names_used(thrice.__code__) == set()
    assert names_used(opened.__code__) == {("open",), ("__file__",)}
    assert names_used(scaled_by.__code__) == set() and ("np", "testing") in names_used(
        compile("lambda: np.testing(inner())", "", "eval")
    )
    assert library_of("torch.nn").startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert library_of("math").startswith("python") and library_of(__name__) is None
    assert library_of("__main__") is None and library_of("mmemo.models.base").startswith("mmemo")


def test_where_a_transformer_came_from_does_not_count(tmp_path):
    one = TextEncoder.pretrained("mmemo-tiny")
    one.model.save_pretrained(tmp_path / "copy")
    two = TextEncoder.pretrained("mmemo-tiny")
    two.model = type(one.model).from_pretrained(tmp_path / "copy", add_pooling_layer=False)
    assert encoder_identity(one) == encoder_identity(two)


def test_a_method_put_back_where_it_was_inherited_changes_nothing(monkeypatch):
    "torchlens leaves torch's modules with the `__setattr__` of nn.Module as one of their own."

    def code():
        return encoder_identity(nn.Linear(2, 2).requires_grad_(False).eval())["code"]

    def own(self, name, value):
        nn.Module.__setattr__(self, name, value)

    before = code()
    monkeypatch.setattr(nn.Linear, "__setattr__", nn.Module.__setattr__)
    assert "__setattr__" in vars(nn.Linear) and code() == before
    monkeypatch.setattr(nn.Linear, "__setattr__", own)
    assert code() != before


def test_what_a_library_does_to_its_own_classes_is_told_by_its_version(monkeypatch):
    "torch puts other functions into nn.Module the first time that something is compiled."
    from torch._dynamo import mutation_guard

    def code():
        return encoder_identity(nn.Linear(2, 2).requires_grad_(False).eval())["code"]

    def own(self, *args):
        raise AssertionError("never called")

    before = code()
    with monkeypatch.context() as patch:
        # as in a process that has compiled nothing yet; what is put back is what was there
        for name in ("__init__", "__setstate__"):
            patch.setattr(nn.Module, name, vars(nn.Module)[name])
        patch.setattr(nn.Module, "___has_generation_tag_patch", True, raising=False)
        patch.delattr(nn.Module, "___has_generation_tag_patch")
        was = nn.Module.__init__
        mutation_guard.install_generation_tagging_init()
        assert nn.Module.__init__ is not was and code() == before
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", nn.Bilinear.forward)
        assert code() != before
    for change in (own, torch.no_grad()(own), property(own), staticmethod(own)):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "extra_repr", change)
            assert code() != before
    assert code() == before


def test_what_another_library_adds_to_a_class_changes_nothing_unless_it_is_called(monkeypatch):
    "transformers gives nn.Module a `smart_apply` when it loads weights."
    from transformers import PreTrainedModel

    class Calling(nn.Linear):
        def forward(self, x):
            return super().forward(self.smart_apply(x))

    def code(kind=nn.Linear):
        return encoder_identity(kind(2, 2).requires_grad_(False).eval())["code"]

    before, calling = code(), code(Calling)
    monkeypatch.setattr(nn.Module, "smart_apply", PreTrainedModel.tie_weights, raising=False)
    assert code() == before and code(Calling) != calling
    calling = code(Calling)
    monkeypatch.setattr(nn.Module, "smart_apply", PreTrainedModel.init_weights)
    assert code() == before and code(Calling) != calling
    monkeypatch.setattr(nn.Linear, "extra_repr", PreTrainedModel.tie_weights)
    assert code() != before
