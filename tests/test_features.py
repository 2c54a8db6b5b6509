"""Tables of features by id, and a cache that is asked once for each input and model."""

import errno
import importlib.util
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from children import clean_server
from streams import padded
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError
from mmemo.data.features import (
    Features,
    attach_features,
    egemaps_features,
    read_features,
    write_features,
)
from mmemo.models.base import MeanPool, Standardize, precompute
from mmemo.models.cache import FeatureCache, encoder_identity
from mmemo.models.text import TextEncoder, Tokenizer

IDS = ["007", "b.1", "c"]
X = np.arange(15, dtype=np.float32).reshape(3, 5) / 7


def safetensors_each(path, ids, x):
    safetensors.torch.save_file({i: torch.tensor(r) for i, r in zip(ids, x)}, path)


def safetensors_one(path, ids, x):
    safetensors.torch.save_file(
        {"features": torch.tensor(np.array(x))}, path, {"ids": json.dumps(ids)}
    )


def safetensors_half(path, ids, x):
    safetensors.torch.save_file(
        {"features": torch.tensor(np.array(x)).bfloat16()}, path, {"ids": json.dumps(ids)}
    )


def parquet_list(path, ids, x):
    pq.write_table(
        pa.table(
            {"id": ids, "split": ["train"] * len(ids), "features": [list(map(float, r)) for r in x]}
        ),
        path,
    )


def parquet_wide(path, ids, x):
    pq.write_table(
        pa.table({"id": ids} | {f"f{j}": np.array(x)[:, j] for j in range(len(x[0]))}), path
    )


def npz(path, ids, x):
    np.savez(path, ids=np.array(ids), features=np.array(x))


def npy(path, ids, x):
    np.save(path, np.array(x, np.float64))
    path.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n")


def emotion2vec(path, ids, x):
    """As the IEMOCAP scripts write it: frames end to end, whose mean is the row; lengths 1, 2, 3,
    ...
    """
    frames = [np.stack([r + (k - n / 2 + 0.5) for k in range(n)]) for n, r in enumerate(x, start=1)]
    np.save(path, np.concatenate(frames).astype(np.float32))
    path.with_suffix(".lengths").write_text("".join(f"{len(f)}\n" for f in frames))
    path.with_suffix(".emo").write_text("".join(f"{i}\tneu\n" for i in ids))


def funasr(path, ids, x):
    "One file a clip; the last one as frames, in a folder of its own."
    (path / "more").mkdir(parents=True)
    for i, r in list(zip(ids, x))[:-1]:
        np.save(path / f"{i}.npy", r)
    np.save(path / "more" / f"{ids[-1]}.npy", np.stack([x[-1] - 1, x[-1] + 1]))


FORMATS = [
    (safetensors_each, "t.safetensors"),
    (safetensors_one, "t.safetensors"),
    (safetensors_half, "t.safetensors"),
    (parquet_list, "t.parquet"),
    (parquet_wide, "t.parquet"),
    (npz, "t.npz"),
    (npy, "t.npy"),
    (emotion2vec, "t.npy"),
    (funasr, "clips"),
]
another = pytest.mark.filterwarnings("ignore:audio. another encoder")
named = pytest.mark.parametrize("write, name", FORMATS, ids=[w.__name__ for w, _ in FORMATS])


# ------------------------------------------------------------------ tables
@named
def test_every_format_gives_the_same_table(tmp_path, write, name):
    write(tmp_path / name, IDS, X)
    found = read_features(tmp_path / name)
    assert (
        set(found) == set(IDS)
        and found.width == 5
        and all(v.dtype == torch.float32 for v in found.values())
    )
    for i, row in zip(IDS, X):
        assert torch.allclose(
            found[i], torch.tensor(row), atol=1e-2 if write is safetensors_half else 1e-6
        )
    assert bool(found.report) == (write in (emotion2vec, funasr)) and all(
        "averaged" in line for line in found.report
    )


@named
def test_a_row_that_is_not_finite_is_missing_and_said(tmp_path, write, name):
    x = X.copy()
    x[1, 3] = np.nan if write is not npy else np.inf
    write(tmp_path / name, IDS, x)
    found = read_features(tmp_path / name)
    assert (
        set(found) == {"007", "c"}
        and "1 of 3 rows have values that are not finite" in found.report[-1]
        and "b.1" in found.report[-1]
    )


def test_nothing_finite_is_an_error(tmp_path):
    npz(tmp_path / "t.npz", IDS, X * np.nan)
    with pytest.raises(DataError, match="t.npz: no row is finite"):
        read_features(tmp_path / "t.npz")


def test_missing_and_wide_values_of_parquet(tmp_path):
    pq.write_table(
        pa.table({"id": [1, 2, 3], "features": [[1.0, 2.0], None, [3.0, None]]}),
        tmp_path / "t.parquet",
    )
    found = read_features(tmp_path / "t.parquet")
    assert list(found) == ["1"] and "2 of 3 rows" in found.report[0]


def case(message, name="t.npz"):
    return lambda write: pytest.param(write, name, message, id=write.__name__)


@case("t.npz: id 'a' occurs 2 times")
def duplicates(p):
    npz(p, ["a", "b", "a"], X)


@case("t.npz: 2 ids, but 3 rows")
def too_few_ids(p):
    npz(p, ["a", "b"], X)


@case("t.npz, row 1: an empty id")
def empty_id(p):
    npz(p, ["a", " ", "c"], X)


@case("no array ids; the file has features, name")
def no_ids(p):
    np.savez(p, features=X, name=np.array(IDS))


@case(r"features are float32 \[3, 5, 1\]; expected numbers \[N, F\]")
def three_axes(p):
    npz(p, IDS, X[..., None])


@case("needs a pickle")
def pickled_ids(p):
    np.savez(p, ids=np.array(IDS, object), features=X)


@case(r"row 1 \(b\): 2 features, those before it have 3", "t.parquet")
def ragged(p):
    pq.write_table(pa.table({"id": ["a", "b"], "features": [[1.0, 2, 3], [1.0, 2]]}), p)


@case("no column id; the file has name, features", "t.parquet")
def parquet_without_id(p):
    pq.write_table(pa.table({"name": ["a"], "features": [[1.0]]}), p)


@case("column emotion, split would become a feature", "t.parquet")
def labels_among_the_numbers(p):
    pq.write_table(pa.table({"id": ["a"], "f0": [1.0], "emotion": [3], "split": ["train"]}), p)


@case("not a readable parquet", "t.parquet")
def no_parquet(p):
    p.write_bytes(b"PAR1 and nothing else")


@case("metadata under 'ids'", "t.safetensors")
def matrix_without_ids(p):
    safetensors.torch.save_file({"features": torch.zeros(2, 3)}, p)


@case("not a readable safetensors file, or is truncated", "t.safetensors")
def torn(p):
    safetensors_one(p, IDS, X)
    p.write_bytes(p.read_bytes()[:-4])


@case("3 features, those before it have 2", "t.safetensors")
def ragged_tensors(p):
    safetensors.torch.save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, p)


@case("has no ids: put them into t.ids.txt", "t.npy")
def bare_array(p):
    np.save(p, X)


@case("has 6 frames, t.lengths adds up to 5", "t.npy")
def wrong_lengths(p):
    emotion2vec(p, IDS, X)
    p.with_suffix(".lengths").write_text("1\n2\n2\n")


@case("expected a whole number a line", "t.npy")
def words_for_lengths(p):
    emotion2vec(p, IDS, X)
    p.with_suffix(".lengths").write_text("1\nzwei\n3\n")


@case("is a pickle", "t.pt")
def torch_file(p):
    torch.save({"a": torch.zeros(2)}, p)


@case("is a pickle", "t.npz")
def pickle_in_disguise(p):
    p.write_bytes(b"\x80\x04K\x01.")


@case("are read from .safetensors", "t.csv")
def other_file(p):
    p.write_text("id,f0\na,1\n")


@case("holds no .npy files", "t")
def empty_folder(p):
    p.mkdir()


@case("cannot be read", "t.npz")
def no_file(p):
    pass


@pytest.mark.parametrize(
    "write, name, message",
    [
        duplicates,
        too_few_ids,
        empty_id,
        no_ids,
        three_axes,
        pickled_ids,
        ragged,
        parquet_without_id,
        labels_among_the_numbers,
        no_parquet,
        matrix_without_ids,
        torn,
        ragged_tensors,
        bare_array,
        wrong_lengths,
        words_for_lengths,
        torch_file,
        pickle_in_disguise,
        other_file,
        empty_folder,
        no_file,
    ],
)
def test_what_is_wrong_is_said(tmp_path, write, name, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / name)


def test_what_is_written_is_read(tmp_path):
    table = Features({i: torch.randn(4) for i in IDS})
    write_features(tmp_path / "t.safetensors", table)
    found = read_features(tmp_path / "t.safetensors")
    assert (
        list(found) == IDS
        and all(torch.equal(found[i], table[i]) for i in IDS)
        and [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    )


# ------------------------------------------------------------------ joining
def items(ids, **meta):
    s = Stream.of(
        torch.randn(len(ids), 4, 2),
        torch.arange(4) < torch.arange(1, len(ids) + 1)[:, None],
        rate=10,
    )
    return Batch({"audio": s}, {"y": torch.arange(len(ids))}, {"id": ids} | meta)


def test_attach_joins_by_id_whatever_the_order():
    table = Features({i: torch.tensor(r) for i, r in zip(IDS, X)})
    data = attach_features(items(["c", "007", "b.1", "c"]), "audio", table)
    s = data.streams["audio"]
    assert (
        torch.equal(s.x[:, 0], torch.tensor(X[[2, 0, 1, 2]]))
        and s.mask.all()
        and s.x.shape == (4, 1, 5)
    )
    # the mean time of what was there
    assert s.t[:, 0].tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2]) and torch.equal(
        data.targets["y"], torch.arange(4)
    )
    timed = attach_features(items(["c"], seconds=torch.tensor([3.0])), "voice", table)
    assert timed.streams["voice"].t.item() == 1.5 and set(timed.streams) == {"audio", "voice"}


def test_attach_leaves_missing_what_the_table_does_not_know():
    table = Features({"a": torch.ones(3)})
    with pytest.warns(
        UserWarning, match="audio: 4 of 5 items are not in the table.*: b, c, d and 1 more"
    ):
        data = attach_features(items(["b", "a", "c", "d", "e"]), "audio", table)
    s = data.streams["audio"]
    assert (
        s.mask[:, 0].tolist() == [False, True, False, False, False]
        and s.x[~s.mask].eq(0).all()
        and s.x[1].eq(1).all()
    )
    with pytest.raises(
        DataError, match="none of the 2 items.*like x.wav, y.wav, the table's like a"
    ):
        attach_features(items(["x.wav", "y.wav"]), "audio", table)
    with pytest.raises(ConfigError, match="no meta field 'clip'"):
        attach_features(items(["a"]), "audio", table, by="clip")
    by = attach_features(items(["1"], clip=["a"]), "audio", table, by="clip")
    assert by.streams["audio"].mask.all()


# ------------------------------------------------------------------ identity
class Told(nn.Module):
    "An encoder that counts the items it is asked for, and stops the world after `until` calls."

    unkeyed = ("_calls",)

    def __init__(self, until=10**9):
        super().__init__()
        self.linear, self._calls = nn.Linear(3, 2), [0, until]

    def forward(self, s):
        self._calls[1] -= 1
        if self._calls[1] < 0:
            raise Killed
        self._calls[0] += len(s)
        return s.with_x(self.linear(s.x).masked_fill(~s.mask[..., None], 0))


class Killed(BaseException):
    "A process that ends here."


def told(until=10**9, seed=0):
    torch.manual_seed(seed)
    return Told(until).requires_grad_(False)


def speech(n=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Stream.of(
        torch.randn(n, 7, 3, generator=g),
        torch.arange(7) < torch.randint(1, 8, (n, 1), generator=g),
        rate=10,
    )


def test_identity_tells_what_changed():
    def make(**o):
        return nn.Sequential(Standardize(torch.zeros(3), torch.ones(3), **o), MeanPool())

    def differ(a, b):
        return {k for k, v in encoder_identity(a).items() if v != encoder_identity(b)[k]}

    assert differ(make(), make()) == set() and differ(make(), make(limit=9.0)) == {"weights"}
    assert differ(make(), make()[:1]) >= {"structure"}
    other = make()
    other[0].mean += 1e-3
    assert differ(make(), other) == {"weights"}
    other = make()
    other[0].register_buffer("more", torch.ones(1), persistent=False)
    assert differ(make(), other) == {"weights"}
    assert differ(make().train(), make().eval()) == set() and differ(make(), make().bfloat16()) == {
        "weights"
    }


def test_identity_of_a_transformer_knows_its_configuration():
    one, two = TextEncoder.pretrained("mmemo-tiny"), TextEncoder.pretrained("mmemo-tiny")
    assert encoder_identity(one) == encoder_identity(two)
    two.model.config.layer_norm_eps = 1e-3
    assert [
        k for k in encoder_identity(one) if encoder_identity(one)[k] != encoder_identity(two)[k]
    ] == ["settings"]


# ------------------------------------------------------------------ the cache
def quiet(folder, **options):
    return FeatureCache(folder, progress=False, **options)


def close(a: Stream, b: Stream):
    assert (
        torch.equal(a.mask, b.mask)
        and torch.allclose(a.x, b.x, atol=1e-6)
        and torch.allclose(a.t * a.mask, b.t * b.mask)
    )


def test_it_says_what_precompute_says_and_asks_once(tmp_path):
    s = speech()
    twice = Stream(*(torch.cat([v, v[[3, 0]]]) for v in (s.x, s.mask, s.t)))
    data, encoder, cache = (
        Batch({"audio": twice}, {"y": torch.arange(12)}),
        told(),
        quiet(tmp_path, shard=4),
    )
    got = cache(encoder, data, "audio", batch_size=3)
    assert encoder._calls[0] == 10 and cache.report == [
        "audio: 12 items, 10 distinct; 0 known, 10 computed"
    ]
    close(got.streams["audio"], precompute(told(), data, "audio").streams["audio"])
    assert (
        torch.equal(got.targets["y"], data.targets["y"])
        and len(list(tmp_path.glob("*/*.safetensors"))) == 3
    )
    again = quiet(tmp_path)(encoder, data, "audio")
    assert encoder._calls[0] == 10 and torch.equal(again.streams["audio"].x, got.streams["audio"].x)
    order = torch.randperm(12)
    # other rows, other padding: known all the same
    part = cache(encoder, data[order], "audio").streams["audio"]
    assert encoder._calls[0] == 10 and torch.equal(part.x, got.streams["audio"].x[order])
    wide = cache(encoder, Batch({"audio": padded(s, 5, fill=9.0, when=4.0)}), "audio").streams[
        "audio"
    ]
    assert encoder._calls[0] == 10 and torch.equal(wide.x, got.streams["audio"].x[:10])
    cache(encoder, Batch({"audio": Stream(s.x, s.mask, s.t + 1)}), "audio")
    assert encoder._calls[0] == 20  # an encoder may look at the clock


@another
def test_pooled_missing_and_long_features_keep_their_masks(tmp_path):
    s = speech(5)
    s.mask[2] = False
    s.x[2] = 0
    for encoder in (MeanPool(), nn.Sequential(told(), MeanPool()), told()):
        for _ in range(2):
            close(
                quiet(tmp_path)(encoder, Batch({"audio": s}), "audio").streams["audio"],
                precompute(encoder, Batch({"audio": s}), "audio").streams["audio"],
            )
    nothing = quiet(tmp_path)(told(), Batch({"audio": s})[[2]], "audio").streams["audio"]
    assert nothing.x.shape == (1, 1, 2) and not nothing.mask.any()


@another
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_stay(tmp_path, dtype):
    encoder, s = told().to(dtype), speech()
    data = Batch({"audio": s.with_x(s.x.to(dtype))})
    for _ in range(2):
        assert quiet(tmp_path)(encoder, data, "audio").streams["audio"].x.dtype == dtype


def test_a_changed_encoder_is_noticed_and_said(tmp_path):
    data, encoder = Batch({"audio": speech()}), told()
    first = quiet(tmp_path)(encoder, data, "audio").streams["audio"]
    encoder.linear.bias += 1
    with pytest.warns(
        UserWarning, match="audio: another encoder than in audio-.*, its weights changed"
    ):
        second = quiet(tmp_path)(encoder, data, "audio").streams["audio"]
    assert encoder._calls[0] == 20 and torch.allclose(
        second.x[second.mask], first.x[first.mask] + 1, atol=1e-6
    )
    encoder.linear.bias -= 1
    pooled = nn.Sequential(encoder, MeanPool())
    with pytest.warns(UserWarning, match="structure"):
        quiet(tmp_path)(pooled, data, "audio")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_kill_costs_at_most_a_shard(tmp_path):
    data = Batch({"audio": speech(23)})
    # dies in the fourth shard
    with pytest.raises(Killed):
        quiet(tmp_path, shard=6)(told(until=9), data, "audio", batch_size=2)
    encoder, cache = told(), quiet(tmp_path, shard=6)
    got = cache(encoder, data, "audio", batch_size=2)
    assert encoder._calls[0] == 23 - 18 and cache.report == [
        "audio: 23 items, 23 distinct; 18 known, 5 computed"
    ]
    close(got.streams["audio"], precompute(told(), data, "audio").streams["audio"])


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_shard_is_noticed_and_only_it_is_computed_again(tmp_path, damage):
    data, encoder = Batch({"audio": speech(12)}), told()
    want = quiet(tmp_path, shard=4)(encoder, data, "audio", batch_size=4).streams["audio"]
    victim = sorted(tmp_path.glob("*/*.safetensors"))[1]
    good = victim.read_bytes()
    victim.write_bytes(
        {"torn": good[:-7], "flipped": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], "empty": b""}[
            damage
        ]
    )
    with pytest.warns(UserWarning, match="torn or damaged.*computed again"):
        got = quiet(tmp_path, shard=4)(encoder, data, "audio", batch_size=4)
    assert (
        encoder._calls[0] == 16
        and torch.equal(got.streams["audio"].x, want.x)
        and victim.read_bytes() == good
    )


def test_every_bit_of_a_shard_is_looked_at(tmp_path):
    data, encoder = Batch({"audio": speech(2)}), told()
    quiet(tmp_path)(encoder, data, "audio")
    (shard,) = tmp_path.glob("*/*.safetensors")
    good = shard.read_bytes()
    for place in range(0, len(good), 37):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        before = encoder._calls[0]
        with pytest.warns(UserWarning, match="torn or damaged"):
            quiet(tmp_path)(encoder, data, "audio")
        assert encoder._calls[0] == before + 2 and shard.read_bytes() == good


def test_a_shard_of_another_encoder_is_not_read(tmp_path):
    data, one, other = Batch({"audio": speech(3)}), told(seed=0), told(seed=1)
    quiet(tmp_path)(one, data, "audio")
    (shard,) = tmp_path.glob("*/*.safetensors")
    with pytest.warns(UserWarning, match="its weights changed"):
        want = quiet(tmp_path)(other, data, "audio").streams["audio"]
    (home,) = (p.parent for p in tmp_path.glob("*/*.safetensors") if p.parent != shard.parent)
    for path in home.glob("*.safetensors"):
        path.unlink()
    (home / shard.name).write_bytes(shard.read_bytes())
    with pytest.warns(UserWarning, match="torn or damaged"):
        got = quiet(tmp_path)(other, data, "audio").streams["audio"]
    close(got, want)
    assert other._calls[0] == 6


def test_what_cannot_be_read_in_a_cache_is_computed_again(tmp_path):
    data, encoder = Batch({"audio": speech(3)}), told()
    quiet(tmp_path)(encoder, data, "audio")
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.unlink()
    shard.mkdir()
    with (
        pytest.warns(UserWarning, match="cannot be read .*computed again"),
        pytest.raises(ConfigError, match="could not be written"),
    ):
        quiet(tmp_path)(encoder, data, "audio")
    shard.rmdir()
    quiet(tmp_path)(encoder, data, "audio")
    # the note of an encoder is for warnings only: a damaged one is written anew
    (note,) = tmp_path.glob("*/encoder.json")
    good = note.read_bytes()
    for bad in (b"", good[:-5], good.replace(b'"code":"', b'"code":"0')):
        note.write_bytes(bad)
        quiet(tmp_path)(encoder, data, "audio")
        assert note.read_bytes() == good
    note.write_bytes(b"{}")
    quiet(tmp_path)(told(seed=1), data, "audio")


def test_a_full_disk_is_said_and_harms_nothing(tmp_path, monkeypatch):
    data, real, count = Batch({"audio": speech(12)}), os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            quiet(tmp_path, shard=4)(told(), data, "audio")
    assert not list(tmp_path.rglob("*.part"))
    encoder = told()
    quiet(tmp_path)(encoder, data, "audio")
    assert encoder._calls[0] == 8
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        quiet(tmp_path / "file")(told(), data, "audio")
    with pytest.raises(ConfigError, match="shard=0"):
        FeatureCache(tmp_path, shard=0)


def fill(folder, out):
    torch.set_num_threads(1)
    got = quiet(folder, shard=2)(
        told(), Batch({"audio": speech(30)}), "audio", batch_size=2
    ).streams["audio"]
    safetensors.torch.save_file({"x": got.x, "mask": got.mask}, out)


def test_two_processes_at_once_do_not_harm_each_other(tmp_path, monkeypatch):
    context = clean_server(monkeypatch, "test_features")
    workers = [
        context.Process(target=fill, args=(tmp_path / "cache", tmp_path / f"{i}.safetensors"))
        for i in range(3)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0] * 3
    want = precompute(told(), Batch({"audio": speech(30)}), "audio").streams["audio"]
    for i in range(3):
        got = safetensors.torch.load_file(tmp_path / f"{i}.safetensors")
        assert torch.allclose(got["x"], want.x, atol=1e-6) and torch.equal(got["mask"], want.mask)
    encoder = told()
    quiet(tmp_path / "cache")(encoder, Batch({"audio": speech(30)}), "audio")
    assert encoder._calls[0] == 0


def test_a_text_is_encoded_once_whenever_it_was_said(tmp_path):
    tokenizer, encoder, cache = (
        Tokenizer("mmemo-tiny"),
        TextEncoder.pretrained("mmemo-tiny").eval(),
        quiet(tmp_path),
    )
    words = [["really", "not", "tired"], ["so"], [], ["really", "not", "tired"]]
    spans = [
        torch.arange(len(w))[:, None] + torch.tensor([i, i + 0.5]) for i, w in enumerate(words)
    ]
    tokens = cache.text(encoder, tokenizer, words, spans)
    assert cache.report[-1] == "text: 4 items, 3 distinct; 0 known, 3 computed"
    stream = tokenizer.stream(words, spans)
    close(tokens, precompute(encoder, Batch({"text": stream}), "text").streams["text"])
    assert (
        torch.equal(tokens.x[0], tokens.x[3])
        and not torch.equal(tokens.t[0], tokens.t[3])
        and not tokens.mask[2].any()
    )
    with pytest.warns(UserWarning, match="structure"):
        pooled = cache.text(nn.Sequential(encoder, MeanPool()), tokenizer, words, spans)
    close(
        pooled,
        precompute(nn.Sequential(encoder, MeanPool()), Batch({"text": stream}), "text").streams[
            "text"
        ],
    )

    class Every2(nn.Module):
        def forward(self, s):
            return Stream(s.x[:, ::2, None].float(), s.mask[:, ::2], s.t[:, ::2])

    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="clock of its own"):
        cache.text(Every2(), tokenizer, words, spans)


def test_progress_is_shown_where_it_is_wanted(tmp_path, capsys):
    FeatureCache(tmp_path)(told(), Batch({"audio": speech()}), "audio")
    assert "audio features" in (shown := capsys.readouterr().err) and "10/10" in shown
    FeatureCache(tmp_path)(told(), Batch({"audio": speech()}), "audio")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ eGeMAPS
def test_without_opensmile_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mmemo\[egemaps\]'"):
        egemaps_features(["a.wav"])


def test_egemaps_are_opensmiles(corpora_root):
    pytest.importorskip(
        "opensmile", reason="opensmile is an optional extra: pip install 'mmemo[egemaps]'"
    )
    with np.load(corpora_root / "ravdess" / "ravdess_egemapsv02.npz") as z:
        names, want = z["name"].tolist(), z["func"]
    picked = [0, 77, 900]
    found = egemaps_features(
        [corpora_root / "ravdess" / "flac16k" / f"{names[i]}.flac" for i in picked], progress=False
    )
    for i in picked:
        assert np.allclose(found[names[i]].numpy(), want[i], rtol=1e-4, atol=1e-4)
    rng = torch.Generator().manual_seed(0)
    waves = egemaps_features(
        {"long": torch.randn(16000, generator=rng), "short": torch.zeros(100)}, progress=False
    )
    assert list(waves) == ["long"] and waves.width == 88 and "short" in waves.report[0]


def test_a_table_that_is_asked_for_is_read_or_named(tmp_path):
    npz(tmp_path / "t.npz", IDS, X)
    found = read_features(tmp_path / "t.npz")
    assert len(found) == 3 and found.width == 5
    with pytest.raises(DataError, match="gone.npz"):
        read_features(tmp_path / "gone.npz")


@pytest.mark.parametrize("name", ["t.safetensors", "t.parquet"])
def test_both_written_formats_are_read(tmp_path, name):
    table = {i: torch.tensor(row) for i, row in zip(IDS, X)}
    write_features(tmp_path / name, table)
    found = read_features(tmp_path / name)
    assert list(found) == IDS and found.report == []
    assert all(torch.equal(found[i], table[i]) for i in IDS)
