"""State is state: a model that is saved by `state_dict` and loaded again says the same."""

import copy
import importlib
import inspect
import json
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import nn

import mmemo.models
from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import WeightsError
from mmemo.models.audiovisual import LogMel
from mmemo.models.base import (
    ClassHead,
    ConcatFusion,
    MeanPool,
    Multimodal,
    RegressionHead,
    Standardize,
)
from mmemo.models.text import ASSET_FOLDER, TextEncoder, shadowing_folder

# Numbers that a constructor is given and that only act in training, or say how large the module is.
TRAINING_ONLY = {
    "ModalityDropout.p",
    "Dropout.p",
    "Encoders.attention_dropout",
    "Encoders.dropout",
}


def model(mean: float, spread: float, limit: float) -> Multimodal:
    torch.manual_seed(0)
    steps = Standardize(torch.full((5,), mean), torch.full((5,), spread), limit), MeanPool()
    heads = {"phq8": RegressionHead(5, mean, spread), "emotion": ClassHead(5, 7)}
    return Multimodal({"audio": nn.Sequential(*steps)}, ConcatFusion({"audio": 5}, 5, 0.0), heads)


@pytest.mark.parametrize("seed", range(3))
def test_saved_and_loaded_into_a_model_of_other_numbers_it_says_the_same(seed):
    draw = torch.Generator().manual_seed(seed)
    one, other = model(9.2, 4.3, 2.0).eval(), model(0.0, 1.0, 10.0).eval()
    batch = Batch({"audio": Stream.of(30 * torch.randn(4, 6, 5, generator=draw), rate=10)})
    with torch.no_grad():
        wanted = one(batch).predictions
        assert not torch.equal(other(batch).predictions["phq8"], wanted["phq8"])
        other.load_state_dict(load(save(one.state_dict())))
        for task, said in other(batch).predictions.items():
            assert torch.equal(said, wanted[task]), task


def test_the_floor_of_a_spectrogram_is_state():
    one, other = LogMel(mels=8, floor=1e-2), LogMel(mels=8)
    sound = Stream.of(torch.zeros(1, 4000), rate=16_000)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(sound).x, other(sound).x)


def test_weights_of_0_1_do_not_hold_these_numbers_and_are_still_read():
    one, other = model(9.2, 4.3, 2.0), model(9.2, 4.3, 2.0)
    state = one.state_dict()
    for name in ("heads.phq8.mean", "heads.phq8.scale", "encoders.audio.0.limit"):
        del state[name]
    other.load_state_dict(state)
    assert float(other.heads["phq8"].mean) == pytest.approx(9.2)


def test_no_module_keeps_a_number_of_its_output_outside_its_state():
    """Every float that a constructor takes is a buffer, or acts in training only."""
    seen = set()
    for found in pkgutil.iter_modules(mmemo.models.__path__, "mmemo.models."):
        module = importlib.import_module(found.name)
        for name, kind in vars(module).items():
            if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
                continue
            if kind.__module__ != found.name:
                continue
            for parameter in inspect.signature(kind.__init__).parameters.values():
                if parameter.annotation not in (float, "float"):
                    continue
                source = inspect.getsource(kind.__init__)
                if f"self.{parameter.name} = {parameter.name}" in source:
                    seen.add(f"{name}.{parameter.name}")
    assert seen == TRAINING_ONLY


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(ASSET_FOLDER / "mmemo-tiny", tmp_path / "weights"))


def test_weights_of_which_a_part_is_missing_are_refused(folder):
    "The rest would be random, and nobody would know."
    whole = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    without = {k: v for k, v in whole.items() if "layer.0.attention" not in k}
    other = {"x": next(iter(whole.values())).clone()}
    for weights, more in ((without, {}), (other, {}), (whole, {"num_hidden_layers": 9})):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))
        with pytest.raises(WeightsError, match=r"lack \d+ of the tensors of a \w+, which would be"):
            TextEncoder.pretrained(folder)


def test_a_folder_that_shadows_a_hub_name_is_told(folder, monkeypatch):
    folder.rename(folder.with_name("bert-base-uncased"))
    monkeypatch.chdir(folder.parent)
    assert "from the local folder" in shadowing_folder("bert-base-uncased")
    for name in ("mmemo-tiny", "roberta-base", "./bert-base-uncased", str(folder.parent)):
        assert shadowing_folder(name) == ""


def test_a_copy_of_a_model_has_its_own_numbers():
    one = model(9.2, 4.3, 2.0)
    other = copy.deepcopy(one)
    other.heads["phq8"].mean.fill_(1.0)
    assert float(one.heads["phq8"].mean) == pytest.approx(9.2)
