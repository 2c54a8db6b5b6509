"""Encoders over raw media: log-mel spectrograms, a 1-D network over them, r3d_18 over frames,
weights from files, frozen means frozen.
"""

from functools import partial

import librosa
import numpy as np
import pytest
import streams
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.video import R3D_18_Weights, r3d_18

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError, ShapeError, WeightsError
from mmemo.diagnostics.walk import walk
from mmemo.models.audiovisual import R3D, LogMel, WaveCNN, halve_clock, video_weights
from mmemo.models.base import ClassHead, Frozen, Multimodal, Project
from mmemo.models.fusion import ConcatNorm
from mmemo.training.loop import fit
from mmemo.training.objectives import cross_entropy
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET

padded = partial(streams.padded, fill=99.0)


def sound(B=3, N=5003, seed=0):
    "Waveforms of different lengths; the last item is missing."
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([N, N // 2, *torch.randint(N // 3, N, (B - 2,), generator=g)]).unsqueeze(
        1
    )
    mask = torch.arange(N) < length
    mask[-1] = False
    return Stream(
        torch.randn(B, N, generator=g) * 0.1, mask, ((torch.arange(N) + 0.5) / 16000).repeat(B, 1)
    )


def clips(B=3, T=11, size=24, seed=0):
    return streams.pictures(B, T, size, seed, lost=4)


def mels(B=4, L=23, features=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.tensor(
        [L, *torch.randint(4, L, (B - 1,), generator=g)]
    ).unsqueeze(1)
    mask[1, 3:5] = False
    return Stream(
        torch.randn(B, L, features, generator=g), mask, ((torch.arange(L) + 0.5) / 100).repeat(B, 1)
    )


def close(a, b, steps=None, atol=1e-5):
    "The same values, masks and times up to `steps` of the longer one; what is behind is not real."
    n = a.steps if steps is None else steps
    assert torch.allclose(a.x[:, :n], b.x[:, :n], atol=atol, rtol=1e-4) and torch.equal(
        a.mask[:, :n], b.mask[:, :n]
    )
    assert (
        not b.mask[:, n:].any()
        and b.x[:, n:].eq(0).all()
        and torch.allclose(a.t[:, :n][a.mask[:, :n]], b.t[:, :n][b.mask[:, :n]])
    )


@pytest.fixture(scope="module")
def r3d():
    return R3D().eval()


@pytest.fixture(scope="module")
def reference():
    "torchvision's own network with BatchNorms as after training."
    torch.manual_seed(3)
    net = r3d_18(weights=None).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d):
            for v, low in (
                (m.weight, 0.5),
                (m.bias, -0.3),
                (m.running_mean, -0.3),
                (m.running_var, 0.5),
            ):
                nn.init.uniform_(v, low, low + 0.6)
    return net


@pytest.fixture(scope="module")
def converted(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "r3d_18.safetensors"
    save_file(reference.state_dict(), path)
    return path


# ------------------------------------------------------------------ log-mel
@pytest.mark.parametrize("mels, window, hop", [(64, 1024, 160), (20, 512, 333)])
def test_log_mel_is_librosas(mels, window, hop):
    x = torch.randn(2, 7001) * 0.3
    made = LogMel(mels, window=window, hop=hop)(Stream.of(x, rate=16000))
    for row, wave in zip(made.x, x):
        want = librosa.feature.melspectrogram(
            y=wave.numpy(),
            sr=16000,
            n_fft=window,
            hop_length=hop,
            n_mels=mels,
            center=True,
            pad_mode="constant",
        )
        assert np.allclose(row, np.log(np.maximum(want, 1e-5)).T[: made.steps], atol=1e-3)
    assert made.x.shape == (2, -(-7001 // hop), mels) and made.mask.all()
    assert torch.allclose(made.t[0], (torch.arange(made.steps) * hop + 0.5) / 16000)


def test_log_mel_ignores_padding_and_what_is_not_real():
    s, mel = sound(), LogMel(16)
    close(mel(s), mel(padded(s, 777)))
    close(mel(s), mel(Stream(torch.where(s.mask, s.x, torch.nan), s.mask, s.t)))
    assert (
        torch.equal(mel(s).mask, s.mask[:, ::160])
        and not mel(s).mask[-1].any()
        and mel(s).x[-1].eq(0).all()
    )
    alone = mel(s[[1]])
    close(alone, Stream(*(v[[1]] for v in (mel(s).x, mel(s).mask, mel(s).t))))


def test_silence_and_loud_noise_are_finite():
    made = LogMel()(
        Stream.of(
            torch.stack([torch.zeros(900), torch.full((900,), 1e4), torch.randn(900) * 1e-30]),
            rate=16000,
        )
    )
    assert made.x.isfinite().all() and torch.allclose(made.x[0], torch.tensor(1e-5).log())


def test_a_short_sound_has_a_step():
    assert LogMel()(Stream.of(torch.randn(2, 1), rate=16000)).x.shape == (2, 1, 64)


def test_a_pitch_stands_in_its_own_filter():
    x = torch.sin(2 * torch.pi * torch.tensor([[300.0], [3000.0]]) * torch.arange(8000) / 16000)
    loudest = LogMel()(Stream.of(x, rate=16000)).x[:, 10:-10].argmax(2)
    centres = librosa.mel_frequencies(66, fmax=8000)[1:-1]
    assert np.allclose(centres[loudest[0]], 300, atol=40) and np.allclose(
        centres[loudest[1]], 3000, atol=120
    )


def test_log_mel_refuses_what_is_no_waveform_or_has_another_clock():
    with pytest.raises(ShapeError, match=r"a waveform is \[B, N\]"):
        LogMel()(Stream.of(torch.zeros(2, 30, 3), rate=16000))
    with pytest.raises(ShapeError, match="44100 samples a second, LogMel is made for 16000"):
        LogMel()(Stream.of(torch.zeros(2, 300), rate=44100))


# ------------------------------------------------------------------ strides
def test_halve_by_hand():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()
    made, t = halve_clock(mask, torch.arange(7).float().repeat(2, 1))
    assert made.tolist() == [[True, True, False, True], [False] * 4] and t[0].tolist() == [
        0.5,
        3,
        0,
        6,
    ]


# ------------------------------------------------------------------ the 1-D network
def test_wave_cnn_is_torchs_layers_on_a_whole_stream():
    x, net = torch.randn(3, 17, 5), streams.learned(WaveCNN(5, (7, 4)))
    first, second = ((c.weight, c.bias) for c in net.convolutions)
    y = nn.functional.max_pool1d(
        net.norms[0](nn.functional.conv1d(x.mT, *first, padding=1)).relu(), 2, ceil_mode=True
    )
    y = net.norms[1](nn.functional.conv1d(y, *second, padding=1)).relu().mT
    made = net(Stream.of(x, rate=100))
    assert made.x.shape == (3, 9, 4) and torch.allclose(made.x, y, atol=1e-5) and made.mask.all()
    assert torch.allclose(made.t[0, :3], torch.tensor([0.01, 0.03, 0.05]))


@pytest.mark.parametrize("by", [1, 2, 9])
def test_wave_cnn_ignores_padding_and_what_is_not_real(by):
    s, net = mels(), streams.learned(WaveCNN(6, (8, 5, 7)))
    close(net(s), net(padded(s, by)), atol=1e-6)
    assert torch.equal(
        net(s).x, net(Stream(torch.where(s.mask[..., None], s.x, 1e9), s.mask, s.t)).x
    )
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(
        net(Stream(s.x[order], s.mask[order], s.t[order])).x, net(s).x[order], atol=1e-6
    )


def test_wave_cnn_in_training_learns_its_statistics_from_real_steps_only():
    s = mels()
    made = []
    for stream in (s, padded(s, 8)):
        net = streams.learned(WaveCNN(6, (8, 5))).train()
        made.append(
            (net(stream), net.norms[0].running_mean.clone(), net.norms[1].running_var.clone())
        )
    close(made[0][0], made[1][0])
    assert torch.allclose(made[0][1], made[1][1], atol=1e-6) and torch.allclose(
        made[0][2], made[1][2], atol=1e-5
    )


def test_gradients_reach_all_of_the_wave_cnn_and_a_missing_sound_gives_none():
    net, s = WaveCNN(6, (8, 5)).train(), mels()
    gone = Stream(s.x, s.mask & torch.tensor([True, True, False, True])[:, None], s.t)
    out = net(gone)
    out.x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert (
        all(c.weight.grad.abs().sum() > 0 for c in net.convolutions)
        and not out.mask[2].any()
        and out.x[2].eq(0).all()
    )


def test_random_weights_are_the_seeds_and_leave_the_worlds_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = WaveCNN(seed=4), WaveCNN(seed=4), WaveCNN(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.convolutions[1].weight, b.convolutions[1].weight) and not torch.equal(
        a.convolutions[1].weight, c.convolutions[1].weight
    )
    with pytest.raises(ConfigError, match="at least one convolution"):
        WaveCNN(widths=())


# ------------------------------------------------------------------ r3d_18
def test_r3d_is_torchvisions_on_whole_clips(reference, converted):
    frames = torch.randint(0, 256, (2, 9, 3, 32, 40), dtype=torch.uint8)
    made = R3D(converted).eval()(Stream.of(frames, rate=8))
    kinetics = R3D_18_Weights.KINETICS400_V1.transforms()
    x = (frames / 255 - torch.tensor(kinetics.mean)[:, None, None]) / torch.tensor(kinetics.std)[
        :, None, None
    ]
    with torch.no_grad():
        for layer in (net := reference).stem, net.layer1, net.layer2, net.layer3, net.layer4:
            x = layer(x.transpose(1, 2)).transpose(1, 2)
    assert made.x.shape == (2, 2, 512) and torch.allclose(
        made.x, x.mean((3, 4)), atol=1e-4, rtol=1e-4
    )
    assert torch.allclose(
        made.x.mean(1), reference.avgpool(x.transpose(1, 2)).flatten(1), atol=1e-4, rtol=1e-4
    )
    assert torch.allclose(made.t[0], torch.tensor([0.5, 8.5 / 8])) and made.mask.all()


def test_r3d_ignores_padding_missing_clips_and_dropped_frames(r3d):
    s = clips()
    with torch.no_grad():
        made = r3d(s)
        for by in (1, 6):
            close(made, r3d(padded(s, by)), atol=1e-4)
        changed = Stream(torch.where(s.mask[..., None, None, None], s.x, 200), s.mask, s.t)
        assert torch.equal(made.x, r3d(changed).x)
        assert (
            made.x.shape == (3, 2, 512)
            and made.mask.tolist() == [[True, True], [True, False], [False, False]]
            and made.x[2].eq(0).all()
        )
        flipped = r3d(Stream(s.x.flip(0), s.mask.flip(0), s.t.flip(0)))
    assert torch.allclose(flipped.x.flip(0), made.x, atol=1e-4)


def test_bytes_and_fractions_are_the_same_pictures(r3d):
    s = clips(2, 5)
    with torch.no_grad():
        assert torch.allclose(r3d(s).x, r3d(s.with_x(s.x / 255)).x, atol=1e-5)
    with pytest.raises(ShapeError, match=r"frames are \[B, T, 3, H, W\]"):
        r3d(Stream.of(torch.zeros(2, 5, 1, 8, 8), rate=8))


def test_weights_come_from_safetensors_and_from_nothing_else(converted, tmp_path, reference):
    assert video_weights(converted) == video_weights(converted.parent) == converted
    for wrong in ("kinetics400", "r3d_18.pth", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="Convert it once.*save_file.*weights='random'"):
            R3D(wrong)
    (tmp_path / "torn.safetensors").write_bytes(converted.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="torn.safetensors is no safetensors file"):
        R3D(tmp_path / "torn.safetensors")
    state = reference.state_dict()
    save_file(
        {k: v for k, v in state.items() if k != "layer2.0.conv1.0.weight"},
        tmp_path / "less.safetensors",
    )
    with pytest.raises(
        WeightsError, match="holds no r3d_18: 1 of its tensors.*first layer2.0.conv1.0.weight"
    ):
        R3D(tmp_path / "less.safetensors")
    save_file(state | {"stem.0.weight": torch.zeros(3)}, tmp_path / "shape.safetensors")
    with pytest.raises(WeightsError, match="first stem.0.weight"):
        R3D(tmp_path / "shape.safetensors")


def test_random_video_weights_are_the_seeds():
    a, b = R3D(seed=2).state_dict(), R3D(seed=3).state_dict()
    assert torch.equal(
        R3D(seed=2).state_dict()["stem.0.weight"], a["stem.0.weight"]
    ) and not torch.equal(a["stem.0.weight"], b["stem.0.weight"])


# ------------------------------------------------------------------ fusion
def test_concat_norm_is_its_layers_and_takes_a_lone_item():
    fuse = ConcatNorm({"audio": 3, "video": 4}, 6, dropout=0.0).train()
    s = {"audio": mels(5, 9, 3), "video": mels(5, 7, 4, seed=1)}
    joined = fuse.linear(torch.cat([masked_mean(v.x, v.mask) for v in s.values()], 1))
    assert torch.allclose(
        fuse(s).vector,
        ((joined - joined.mean(0)) / (joined.var(0, unbiased=False) + 1e-5).sqrt()).relu(),
        atol=1e-4,
    )
    moved = fuse.norm.running_mean.clone()
    one = {k: v[[2]] for k, v in s.items()}
    lone = fuse(one).vector
    assert torch.equal(fuse.norm.running_mean, moved) and torch.equal(lone, fuse.eval()(one).vector)
    assert torch.allclose(
        fuse({k: padded(v, 3) for k, v in s.items()}).vector, fuse(s).vector, atol=1e-5
    )


# ------------------------------------------------------------------ the whole
def two_heads(B=6, freeze=Frozen):
    batch = Batch(
        {"audio": sound(B, 3000), "video": clips(B, 9, 16)},
        {"emotion": torch.arange(B) % 7, "sentiment": torch.arange(B) % 3},
    )
    encoders = {
        "audio": nn.Sequential(LogMel(16), freeze(WaveCNN(16, (8, 12))), Project(12, 10)),
        "video": nn.Sequential(freeze(R3D()), Project(512, 10)),
    }
    return (
        Multimodal(
            encoders,
            ConcatNorm({"audio": 10, "video": 10}, 8),
            {"emotion": ClassHead(8, 7), "sentiment": ClassHead(8, 3)},
        ),
        batch,
    )


def test_frozen_means_frozen_through_a_training_run():
    model, batch = two_heads()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if ".module." in k}
    fit(
        model,
        cross_entropy("emotion"),
        batch,
        batch,
        Plan(epochs=2, batch_size=3, lr=1e-2),
        tracking=QUIET,
    )
    after = model.state_dict()
    assert len(frozen) > 100 and all(torch.equal(after[k], v) for k, v in frozen.items())
    assert any("running_mean" in k for k in frozen) and any(
        "num_batches_tracked" in k for k in frozen
    )
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".module." in k)


def test_without_gradients_alone_the_statistics_move():
    "The trap that Frozen is for; without it the test above would hold for the wrong reason."
    model, batch = two_heads(freeze=lambda m: m.requires_grad_(False))
    before = {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}
    fit(
        model,
        cross_entropy("emotion"),
        batch,
        batch,
        Plan(epochs=1, batch_size=3, lr=1e-2),
        tracking=QUIET,
    )
    moved = [k for k, v in before.items() if not torch.equal(model.state_dict()[k], v)]
    assert len(moved) == len(before)


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one():
    model, batch = two_heads()
    out = model.train()(batch)
    (
        out.predictions["emotion"].square().sum() + out.predictions["sentiment"].square().sum()
    ).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (".module." in name), name


def test_the_published_shapes_can_be_walked():
    model, batch = two_heads(3)
    made = walk(model, batch, depth=1)
    shapes = {(r.lane, r.name): r.shape for r in made.rows}
    assert made.params > 33e6 and (3, 19, 16) in shapes.values() and (3, 2, 512) in shapes.values()
