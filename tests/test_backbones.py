"""Speech and image transformers behind streams: clocks through strides, padding that changes
nothing, weights from files; attention over modality vectors.
"""

import json
import warnings
from functools import partial

import numpy as np
import pytest
import streams
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
)

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError, ShapeError, WeightsError
from mmemo.diagnostics.walk import walk
from mmemo.models.backbones import (
    PUBLISHED_CONFIGS,
    ImageEncoder,
    OwnLength,
    SpeechEncoder,
    at_own_length,
    window_times,
)
from mmemo.models.base import ClassHead, Frozen, Multimodal
from mmemo.models.fusion import ModalityAttention
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import cross_entropy
from mmemo.training.plan import Plan
from mmemo.training.tracking import Tracking

padded = partial(streams.padded, fill=99.0, when=77.0)
TINY = {k: v for k, v in PUBLISHED_CONFIGS["wav2vec2-tiny"].items() if k != "model_type"}
SEW = TINY | {"conv_dim": (8,) * 6 + (16,) * 7}
KINDS = {
    "wav2vec2": ("wav2vec2", TINY),
    "wav2vec2, large": (
        "wav2vec2",
        TINY | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    ),
    "hubert": ("hubert", TINY),
    "hubert, large": (
        "hubert",
        TINY | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    "wavlm": ("wavlm", TINY),
    "unispeech": ("unispeech", TINY),
    "unispeech-sat": ("unispeech-sat", TINY),
    "data2vec-audio": ("data2vec-audio", TINY),
    "sew": ("sew", SEW),
    "sew-d": ("sew-d", SEW),
    "wav2vec2-conformer": ("wav2vec2-conformer", TINY),
    "hubert, batch norm": ("hubert", TINY | {"conv_pos_batch_norm": True}),
}


def sound(B=5, N=7003, seed=0):
    "Waveforms of different lengths, one with a hole, one shorter than a window, the last missing."
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor(
        [N, N // 2, *torch.randint(N // 3, N, (B - 4,), generator=g), 250, 0]
    ).unsqueeze(1)
    mask = torch.arange(N) < length
    mask[0, 2000:3100] = False
    return Stream(
        torch.randn(B, N, generator=g) * 0.1, mask, ((torch.arange(N) + 0.5) / 16000).repeat(B, 1)
    )


def frames(B=3, T=5, size=20, seed=0):
    return streams.pictures(B, T, size, seed, lost=2)


def speech(kind="wav2vec2", **changes):
    name, options = KINDS[kind]
    return streams.learned(
        SpeechEncoder.blank({"model_type": name, **options, **changes}), scale=0.15
    )


def same(a, b, atol=2e-5):
    n = min(a.steps, b.steps)
    assert (
        torch.allclose(a.x[:, :n], b.x[:, :n], atol=atol, rtol=1e-4)
        and torch.equal(a.mask[:, :n], b.mask[:, :n])
        and torch.allclose(a.t[:, :n], b.t[:, :n], atol=1e-6)
    )
    for longer in (a, b):
        assert (
            not longer.mask[:, n:].any()
            and longer.x[:, n:].eq(0).all()
            and longer.t[:, n:].eq(0).all()
        )


# ------------------------------------------------------------------ clocks
@pytest.mark.parametrize("size, hop", [(5, 3), (4, 4), (7, 1)])
def test_windows_by_hand(size, hop):
    mask, t = torch.rand(3, 40) < 0.5, torch.rand(3, 40).cumsum(1)
    mask[2, 8:30] = False
    real, times = window_times(mask, t, size, hop)
    assert real.shape == (3, (40 - size) // hop + 1)
    for i in range(3):
        for k in range(real.shape[1]):
            inside = [j for j in range(k * hop, k * hop + size) if mask[i, j]]
            assert (
                bool(real[i, k]) == bool(inside)
                and abs(float(times[i, k]) - (float(t[i, inside].mean()) if inside else 0)) < 1e-5
            )


def test_a_clock_keeps_its_digits_after_an_hour():
    t = (3600 + (torch.arange(1600, dtype=torch.float64) + 0.5) / 16000).float().unsqueeze(0)
    made = window_times(torch.ones(1, 1600, dtype=torch.bool), t, 400, 320)[1]
    # what float32 can say of 3600.01
    assert (made[0].double() - (3600 + (320 * torch.arange(4) + 200) / 16000)).abs().max() < 3e-4


def test_own_length_is_a_loop_over_rows():
    x, lengths, conv = torch.randn(5, 2, 30), [30, 7, 12, 7, 29], nn.Conv1d(2, 3, 4, 2)
    made = at_own_length(conv, x, lengths, -1, 14)
    for row, n, y in zip(x, lengths, made):
        k = (n - 4) // 2 + 1
        assert (
            torch.allclose(y[:, :k], conv(row[None, :, :n])[0], atol=1e-6) and y[:, k:].eq(0).all()
        )
    assert at_own_length(lambda v: v.mT, x, [9] * 5, 1, 20).shape == (5, 20, 2)


# ------------------------------------------------------------------ speech
@pytest.mark.parametrize("kind", KINDS)
def test_every_speech_model_gives_an_item_what_it_would_get_alone(kind):
    "The model of transformers itself, one item at a time, without mask and padding, is the oracle."
    encoder, s = speech(kind), sound()
    with torch.no_grad():
        made, more = encoder(s), encoder(padded(s, 2777))
        same(made, more)
        for i in range(4):
            n = max(int((torch.arange(1, s.steps + 1) * s.mask[i]).max()), encoder.least)
            x = torch.where(s.mask[i], s.x[i], 0)[:n]
            heard = s.x[i][s.mask[i]]
            x = torch.where(
                s.mask[i, :n], (x - heard.mean()) / (heard.var(unbiased=False) + 1e-7).sqrt(), 0
            )
            first = getattr(encoder.model.feature_extractor.conv_layers, "0")
            if isinstance(first, OwnLength):
                first.lengths = [n]
            alone = encoder.model(x[None]).last_hidden_state[0]
            real = made.mask[i]
            assert (
                torch.allclose(
                    made.x[i, : len(alone)][real[: len(alone)]],
                    alone[real[: len(alone)]],
                    atol=5e-5,
                    rtol=1e-3,
                )
                and not real[len(alone) :].any()
            )
    assert (
        made.x.isfinite().all()
        and made.x.masked_select(~made.mask.unsqueeze(-1)).eq(0).all()
        and not made.mask[-1].any()
        and made.mask[-2].tolist() == [True] + [False] * (made.steps - 1)
    )
    assert (
        encoder.width == 48
        and made.x.shape == (5, (7003 - 400) // 320 + 1, 48)
        and encoder.together
        == (
            kind.split(",")[0] in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
            and "batch norm" not in kind
        )
    )


def test_group_norm_at_own_length_is_transformers_own_forward():
    """Against an unchanged model of transformers; with the usual mask that model is far off, so
    this test could fail.
    """
    torch.manual_seed(0)
    encoder = SpeechEncoder.blank("wav2vec2-tiny", 3, normalize=False).eval()
    usual, s = AutoModel.from_config(encoder.model.config).eval(), sound(4, 6400)
    first = encoder.model.feature_extractor.conv_layers[0]
    assert (
        usual.load_state_dict(encoder.model.state_dict())
        and isinstance(first, OwnLength)
        and type(usual.feature_extractor.conv_layers[0]).__name__ == "Wav2Vec2GroupNormConvLayer"
    )
    n = int(s.mask[1].sum())
    with torch.no_grad():
        made, alone = encoder(s).x[1], usual(s.x[1:2, :n]).last_hidden_state[0]
        leaking = usual(
            s.x.masked_fill(~s.mask, 0), attention_mask=s.mask.long()
        ).last_hidden_state[1, : len(alone)]
    assert (
        torch.allclose(made[: len(alone)], alone, atol=1e-5)
        and (leaking - alone).norm() > 0.05 * alone.norm()
    )


def test_steps_times_and_permutation():
    encoder, s = speech(), sound()
    made = encoder(s)
    assert (encoder.window, encoder.hop) == (400, 320)
    for i in range(5):
        end = max(int((torch.arange(1, s.steps + 1) * s.mask[i]).max()), 400)
        for k in range(made.steps):
            inside = [j for j in range(k * 320, min(k * 320 + 400, s.steps)) if s.mask[i, j]]
            assert bool(made.mask[i, k]) == (bool(inside) and k * 320 + 400 <= end)
            if made.mask[i, k]:
                assert abs(float(made.t[i, k] - s.t[i, inside].mean())) < 1e-5
    # the hole
    assert (
        torch.allclose(made.t[1, :3], torch.tensor([0.0125, 0.0325, 0.0525]))
        and not made.mask[0, 7:9].any()
    )
    order = torch.tensor([3, 0, 4, 2, 1])
    same(
        encoder(Stream(s.x[order], s.mask[order], s.t[order])),
        Stream(made.x[order], made.mask[order], made.t[order]),
    )
    assert torch.equal(encoder(Stream(torch.where(s.mask, s.x, torch.nan), s.mask, s.t)).x, made.x)


def test_normalisation_is_the_feature_extractors():
    wave = torch.randn(1, 3000) * 0.3 + 0.2
    want = Wav2Vec2FeatureExtractor(do_normalize=True)(
        wave[0].numpy(), sampling_rate=16000, return_tensors="pt"
    ).input_values
    encoder = SpeechEncoder.blank("wav2vec2-tiny").eval()
    plain = SpeechEncoder(encoder.model, normalize=False).eval()
    with torch.no_grad():
        made = encoder(Stream.of(wave, rate=16000)).x
        assert torch.allclose(
            made, plain(Stream.of(want, rate=16000)).x, atol=1e-5
        ) and torch.allclose(made, encoder(Stream.of(wave * 7 - 3, rate=16000)).x, atol=1e-3)


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm", "data2vec-audio", "sew"])
def test_silence_and_scraps_are_finite_with_their_gradients(kind):
    encoder = SpeechEncoder.blank({"model_type": KINDS[kind][0], **KINDS[kind][1]}).train()
    for N in (1, 399, 400, 1000):
        x = torch.zeros(3, N)
        x[1] = 5.0
        x[2, :1] = 1e-8
        mask = torch.ones(3, N, dtype=torch.bool)
        mask[2, 1:] = False
        made = encoder(Stream.of(x, mask, rate=16000))
        made.x.square().sum().backward()
        assert (
            made.x.isfinite().all()
            and made.steps == (max(N, encoder.least) - 400) // 320 + 1
            and made.mask[:, 0].all()
            and made.mask[2].sum() == 1
        )
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_noise_of_a_training_pass_is_torchs_alone():
    """Neither NumPy's generator nor layers that are skipped: the same seed gives the same numbers,
    whatever was drawn elsewhere.
    """
    encoder, made = (
        SpeechEncoder.blank(
            "wav2vec2-tiny", mask_time_prob=0.9, mask_time_min_masks=5, layerdrop=0.9
        ).train(),
        [],
    )
    for seed in (1, 2):
        torch.manual_seed(0)
        np.random.seed(seed)
        made.append(encoder(sound()).x)
    assert torch.equal(*made)
    encoder(sound()).x.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters()) and [
        n for n, p in encoder.named_parameters() if not p.requires_grad
    ] == ["model.masked_spec_embed"]


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm", "hubert, large", "data2vec-audio"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    grads = []
    for on in (False, True):
        encoder = SpeechEncoder.blank(
            {"model_type": KINDS[kind][0], **KINDS[kind][1]},
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
        ).train()
        if on:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        s, other = sound(), sound(seed=1)
        # two calls, then one backward pass: each recomputes with its own lengths
        (encoder(s).x.square().sum() + encoder(other[[1, 0]]).x.square().sum()).backward()
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
        if kind == "wav2vec2":
            assert encoder.model.feature_extractor.conv_layers[0].gradient_checkpointing == on
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-4, rtol=1e-3) for n in grads[0])


def test_speech_refuses_what_it_cannot_hear():
    with pytest.raises(ShapeError, match=r"a waveform is \[B, N\]"):
        speech()(Stream.of(torch.zeros(2, 30, 3), rate=16000))
    with pytest.raises(ShapeError, match="44100 samples a second, this model is made for 16000"):
        speech()(Stream.of(torch.zeros(2, 3000), rate=44100))
    for kind in (
        "vit-tiny",
        {"model_type": "wav2vec2", **TINY, "add_adapter": True, "output_hidden_size": 48},
    ):
        with pytest.raises(
            ConfigError,
            match="hears no waveform, or has an adapter; choose one of wav2vec2, hubert",
        ):
            SpeechEncoder.blank(kind)
    with pytest.raises(ConfigError, match="no transformer can be made of .*nonesuch"):
        SpeechEncoder.blank({"model_type": "nonesuch"})


# ------------------------------------------------------------------ images
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_frame_by_frame(pool):
    encoder, s = (
        streams.learned(ImageEncoder.blank("vit-tiny", pool=pool), scale=0.1),
        frames(size=64),
    )
    s = Stream(s.x[..., :64], s.mask, s.t)
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.no_grad():
        made = encoder(s)
        assert (
            made.x.shape == (3, 5, 48)
            and torch.equal(made.mask, s.mask)
            and torch.equal(made.t, s.t)
        )
        for i in range(3):
            for k in range(5):
                if not s.mask[i, k]:
                    assert made.x[i, k].eq(0).all()
                    continue
                tokens = encoder.model(
                    processor(s.x[i, k], return_tensors="pt").pixel_values
                ).last_hidden_state[0]
                assert torch.allclose(
                    made.x[i, k], tokens[0] if pool == "cls" else tokens[1:].mean(0), atol=1e-5
                )


@pytest.mark.parametrize(
    "kind, tokens",
    [
        ("vit", 1),
        ("deit", 2),
        ("beit", 1),
        ("dinov2", 1),
        ("dinov2_with_registers", 5),
        ("swin", 0),
        ("convnext", 0),
        ("resnet", 0),
    ],
)
def test_image_models_of_every_shape(kind, tokens):
    "Padding, real frames only, bytes and fractions, and which of its words are no patches."
    small = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    small = {
        "swin": {
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [2, 2],
        },
        "convnext": {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2},
        "resnet": {"hidden_sizes": [8, 12], "depths": [1, 1], "embedding_size": 8},
    }.get(kind, small)
    encoder, s = ImageEncoder.blank({"model_type": kind, **small}).eval(), frames(size=32)
    assert (
        encoder.special == tokens
        and encoder.pool == ("cls" if tokens else "mean")
        and encoder.width == {"swin": 24, "convnext": 12, "resnet": 12}.get(kind, 24)
    )
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with torch.no_grad():
        made = encoder(s)
        assert (
            made.x.shape == (3, 5, encoder.width)
            and len(seen) == 1
            and seen[0][0] == int(s.mask.sum())
        )
        more = encoder(padded(s, 3))
        assert torch.allclose(more.x[:, :5], made.x, atol=1e-6) and more.x[:, 5:].eq(0).all()
        assert torch.allclose(encoder(s.with_x(s.x / 255)).x, made.x, atol=1e-5) and torch.allclose(
            encoder(s[[1]]).x[0], made.x[1, :2], atol=1e-5
        )
        mean = ImageEncoder(encoder.model, pool="mean").eval()
        tokens_out = encoder.model(torch.zeros(1, 3, 32, 32)).last_hidden_state
        if tokens_out.ndim == 3:
            assert tokens_out[:, mean.special :].shape[1] in (16, 64 // 4)
    if not tokens:
        with pytest.raises(ConfigError, match="pool='cls' cannot be: a .* has no CLS: choose mean"):
            ImageEncoder(encoder.model, pool="cls")


def test_pictures_are_brought_to_the_models_size_and_scale():
    from torchvision.transforms.v2.functional import resize

    encoder, s = ImageEncoder.blank("vit-tiny").eval(), frames(2, 3, 90)
    with torch.no_grad():
        small = s.with_x(
            resize(s.x.flatten(0, 1).float() / 255, [64, 64], antialias=True).reshape(
                2, 3, 3, 64, 64
            )
        )
        assert torch.allclose(encoder(s).x, encoder(small).x, atol=1e-5)
        a, b = (
            ImageEncoder(encoder.model, [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]).eval(),
            ImageEncoder(encoder.model, 0.0, 1.0).eval(),
        )
        shifted = small.with_x(
            (small.x - torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1))
            / torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
        )
        assert torch.allclose(a(small).x, b(shifted).x, atol=1e-5)


def test_nobody_seen_still_has_gradients():
    encoder, s = ImageEncoder.blank("vit-tiny").train(), frames(2, 3, 16)
    encoder(Stream(s.x, torch.zeros_like(s.mask), s.t)).x.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in encoder.parameters())


def test_torchvisions_networks_work_too():
    from torchvision.models import resnet18

    net = resnet18(weights=None).eval()
    net.fc = nn.Identity()
    encoder, s = (
        ImageEncoder(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=48, width=512).eval(),
        frames(),
    )
    with torch.no_grad():
        made = encoder(s)
        one = nn.functional.interpolate(
            s.x[:1, 0].float() / 255, (48, 48), mode="bilinear", antialias=True
        )
        assert made.x.shape == (3, 5, 512) and torch.allclose(
            made.x[0, 0], net((one - encoder.mean) / encoder.std)[0], atol=1e-5
        )
    with pytest.raises(ConfigError, match="a ResNet does not say its width: give width="):
        ImageEncoder(net)


def test_images_refuse_what_they_cannot_see():
    with pytest.raises(ShapeError, match=r"frames are \[B, T, 3, H, W\]"):
        ImageEncoder.blank()(Stream.of(torch.zeros(2, 5, 1, 8, 8), rate=8))
    with pytest.raises(ConfigError, match="pool='max' cannot be: a ViTModel has cls and mean"):
        ImageEncoder.blank(pool="max")
    with pytest.raises(ConfigError, match="does not look at pictures alone"):
        ImageEncoder.blank("wav2vec2-tiny")


# ------------------------------------------------------------------ weights
def test_blank_is_the_seeds_and_takes_names_folders_dicts_and_configurations(tmp_path):
    a = SpeechEncoder.blank("wav2vec2-tiny", 1)

    def same_weights(b):
        return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

    before = torch.get_rng_state()
    a.model.config.save_pretrained(tmp_path)
    for source in (
        "wav2vec2-tiny",
        PUBLISHED_CONFIGS["wav2vec2-tiny"],
        a.model.config,
        tmp_path,
        str(tmp_path),
    ):
        assert same_weights(SpeechEncoder.blank(source, 1))
    assert not same_weights(SpeechEncoder.blank("wav2vec2-tiny", 2)) and torch.equal(
        before, torch.get_rng_state()
    )
    assert (
        SpeechEncoder.blank("wav2vec2-tiny", hidden_size=32).width == 32
        and SpeechEncoder.blank(a.model.config, num_hidden_layers=1).model.config.num_hidden_layers
        == 1
        and a.model.config.num_hidden_layers == 2
    )
    with pytest.raises(WeightsError, match="there is no folder './none'"):
        SpeechEncoder.blank("./none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints as the hub has them: of a pre-training and of a classification model, with their
    preprocessors.
    """
    root = tmp_path_factory.mktemp("weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        speech, vit = (
            Wav2Vec2ForPreTraining(SpeechEncoder.blank("wav2vec2-tiny").model.config),
            ViTForImageClassification(ImageEncoder.blank("vit-tiny").model.config),
        )
        speech.save_pretrained(root / "speech")
        vit.save_pretrained(root / "vit")
    (root / "speech" / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": False, "sampling_rate": 8000})
    )
    (root / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    return root, speech, vit


def test_pretrained_weights_are_those_of_the_file(folders):
    root, speech, vit = folders
    ears, eyes = (
        SpeechEncoder.pretrained(root / "speech"),
        ImageEncoder.pretrained(str(root / "vit"), pool="mean"),
    )
    assert (
        not ears.normalize
        and ears.rate == 8000
        and eyes.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        and eyes.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
        and eyes.pool == "mean"
    )
    for made, source in ((ears.model, speech.wav2vec2), (eyes.model, vit.vit)):
        state = source.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items()) and not any(
            "pooler" in k for k in made.state_dict()
        )


def test_weights_that_are_not_whole_are_refused(folders, tmp_path):
    import shutil

    for name, spoil in (
        ("less", lambda state: state.pop("wav2vec2.encoder.layers.1.attention.k_proj.weight")),
        (
            "shape",
            lambda state: state.update(
                {"wav2vec2.feature_projection.projection.bias": torch.zeros(3)}
            ),
        ),
    ):
        shutil.copytree(folders[0] / "speech", tmp_path / name)
        state = load_file(tmp_path / name / "model.safetensors")
        spoil(state)
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        WeightsError,
        match=(
            "lack 1 of the tensors of a Wav2Vec2Model, which would be random; first"
            " encoder.layers.1.attention.k_proj.weight"
        ),
    ):
        SpeechEncoder.pretrained(tmp_path / "less")
    with pytest.raises(WeightsError, match="do not fit their config.json"):
        SpeechEncoder.pretrained(tmp_path / "shape")
    (tmp_path / "less" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "less" / "pytorch_model.bin")
    for weights in (tmp_path / "less", "nobody/none", tmp_path / "nowhere"):
        with pytest.raises(WeightsError):
            ImageEncoder.pretrained(weights)


# ------------------------------------------------------------------ attention over modalities
def vectors(B=6, widths=None, seed=0):
    "Streams of different lengths; item 1 has no sound, item 2 only text, item 3 nothing."
    widths = widths or {"text": 7, "audio": 5, "video": 9}
    g, made = torch.Generator().manual_seed(seed), {}
    for k, (name, width) in enumerate(widths.items()):
        T = 4 + k
        mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
        mask[
            [
                i
                for i, lost in {
                    1: ("audio",),
                    2: ("audio", "video"),
                    3: ("text", "audio", "video"),
                }.items()
                if name in lost
            ]
        ] = False
        made[name] = Stream(
            torch.randn(B, T, width, generator=g), mask, torch.rand(B, T, generator=g)
        )
    return made, widths


def test_modality_attention_is_torchs_own():
    """nn.MultiheadAttention and scaled_dot_product_attention with the same weights; for items of
    which all is missing torch has NaN, so they are left out.
    """
    s, widths = vectors()
    fuse = streams.learned(ModalityAttention(widths, 12, heads=3, dropout=0.0), scale=0.4)
    usual, attend = nn.MultiheadAttention(12, 3, batch_first=True).eval(), fuse.attend
    with torch.no_grad():
        usual.in_proj_weight.copy_(
            torch.cat([attend.query.weight, attend.key.weight, attend.value.weight])
        )
        usual.in_proj_bias.copy_(torch.cat([attend.query.bias, attend.key.bias, attend.value.bias]))
        usual.out_proj.weight.copy_(attend.out.weight)
        usual.out_proj.bias.copy_(attend.out.bias)
        made = fuse(s)
        assert made.vector.shape == (6, 12) and made.maps["modalities"].shape == (6, 3, 3, 3)
        present = torch.stack([v.mask.any(1) for v in s.values()], 1)
        x = torch.stack([fuse.project[n](masked_mean(v.x, v.mask)) for n, v in s.items()], 1)
        x = x.masked_fill(~present.unsqueeze(-1), 0)
        found, maps = usual(
            x, x, x, key_padding_mask=~present, need_weights=True, average_attn_weights=False
        )
        for i in (0, 1, 2, 4, 5):
            there = present[i]
            assert torch.allclose(
                made.maps["modalities"][i][:, there][:, :, there],
                maps[i][:, there][:, :, there],
                atol=1e-6,
            )
            y = fuse.norm(x[i] + found[i])[there].mean(0)
            assert torch.allclose(made.vector[i], fuse.mix(y), atol=1e-5)
    gone = ~(present.unsqueeze(2) & present.unsqueeze(1)).unsqueeze(1).expand(-1, 3, -1, -1)
    assert made.maps["modalities"][gone].eq(0).all() and torch.allclose(
        made.maps["modalities"].sum(-1), present.unsqueeze(1).expand(-1, 3, -1).float(), atol=1e-6
    )


def test_modality_attention_ignores_padding_order_and_what_is_missing():
    s, widths = vectors()
    fuse = streams.learned(ModalityAttention(widths, 8, 2), scale=0.4)
    with torch.no_grad():
        made = fuse(s)
        for other in (
            {n: padded(v, 3 + k) for k, (n, v) in enumerate(s.items())},
            {
                n: Stream(torch.where(v.mask.unsqueeze(-1), v.x, torch.nan), v.mask, v.t)
                for n, v in s.items()
            },
        ):
            again = fuse(other)
            assert torch.allclose(again.vector, made.vector, atol=1e-6) and torch.allclose(
                again.maps["modalities"], made.maps["modalities"], atol=1e-6
            )
        order = torch.tensor([4, 2, 0, 5, 1, 3])
        assert torch.allclose(
            fuse({n: Stream(v.x[order], v.mask[order], v.t[order]) for n, v in s.items()}).vector,
            made.vector[order],
            atol=1e-6,
        )
        assert (
            torch.allclose(
                fuse({n: v[[3]] for n, v in s.items()}).vector[0], made.vector[3], atol=1e-6
            )
            and made.vector.isfinite().all()
        )
    fuse.train()
    fuse(s).vector.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fuse.parameters()) and (
        sum(p.grad.abs().sum() for p in fuse.parameters()) > 0
    )
    with pytest.raises(ConfigError, match="width=10 cannot be divided among heads=4"):
        ModalityAttention(widths, 10, 4)


def test_maps_and_predictions_come_from_one_pass():
    """With dropout, a second pass would draw other noise; what is returned as map times the values
    is what the vector was made of.
    """
    s, widths = vectors()
    fuse, seen = ModalityAttention(widths, 8, 2, dropout=0.5).train(), []
    fuse.attend.dropout.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made = fuse(s)
    assert len(seen) == 1 and torch.equal(seen[0], made.maps["modalities"])


# ------------------------------------------------------------------ the whole
def whole(freeze=lambda m: m):
    s = {"audio": sound(4, 3000), "video": frames(4, 4, 16)}
    encoders = {"audio": freeze(SpeechEncoder.blank()), "video": ImageEncoder.blank()}
    return Multimodal(
        encoders, ModalityAttention({"audio": 48, "video": 48}, 16), {"emotion": ClassHead(16, 3)}
    ), Batch(s, {"emotion": torch.tensor([0, 1, 2, 0])})


def test_every_parameter_that_learns_gets_a_gradient_and_no_frozen_one():
    model, batch = whole(Frozen)
    model.train()(batch).predictions["emotion"].square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (not name.startswith("encoders.audio")), name


def test_it_trains_from_raw_media_and_resumes_exactly(tmp_path):
    """Dropout, checkpointed layers and all: a run that dies between epochs and goes on in a new
    model ends with the very weights of one that did not.
    """

    def run(folder, die=None):
        def at_epoch(model, epoch):
            if epoch == die:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        model, batch = whole()
        model.encoders["audio"].model.gradient_checkpointing_enable({"use_reentrant": False})
        return model, fit(
            model,
            cross_entropy("emotion"),
            batch,
            None,
            Plan(epochs=3, batch_size=2, lr=1e-3),
            tracking=Tracking(folder, progress=False),
            hooks=Hooks(at_epoch=at_epoch),
        )

    straight, history = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", die=1)
    resumed, again = run(tmp_path / "b")
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in straight.state_dict().items())
    assert (
        [r["loss"] for r in history.steps][-4:] == [r["loss"] for r in again.steps][-4:]
        and len(history.steps) == 6
        and all(np.isfinite(r["loss"]) for r in history.steps)
    )


def test_true_sizes_are_walked_without_weights():
    model, batch = whole()
    with torch.device("meta"):
        model = Multimodal(
            {
                "audio": SpeechEncoder.blank("facebook/wav2vec2-base"),
                "video": ImageEncoder.blank("google/vit-base-patch16-224-in21k"),
            },
            ModalityAttention({"audio": 768, "video": 768}, 256),
            {"emotion": ClassHead(256, 3)},
        )
    assert (
        sum(p.numel() for p in model.encoders["audio"].parameters()) == 94_371_712
        and sum(p.numel() for p in model.encoders["video"].parameters()) == 85_798_656
    )
    made = walk(model, batch, depth=1)
    shapes = {(r.lane, r.name): r.shape for r in made.rows}
    assert (
        shapes["audio", "output"] == (4, 9, 768)
        and shapes["video", "output"] == (4, 4, 768)
        and made.params > 180e6
    )
    assert next(r for r in made.rows if r.kind == "ViTModel").shape == (
        int(batch.streams["video"].mask.sum()),
        197,
        768,
    )
