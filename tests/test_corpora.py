"""The Arrow-backed corpus: what comes out is what went in, a cached one parses nothing, and splits
keep people together.
"""

import json
import os
import pickle
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from children import clean_server
from hypothesis import given, settings
from hypothesis import strategies as st

import mmemo.data.corpus as corpus_module
from mmemo.core.batch import Batch, Stream, collate
from mmemo.core.errors import ConfigError, DataError
from mmemo.data.arrow import ArrowColumns
from mmemo.data.corpus import Corpus, CorpusInfo, cached
from mmemo.data.splits import check_split, leave_one_out_rows, speaker_folds, speaker_split
from mmemo.synthetic.known_answer import known_answer


def item(i: int, T: int, F: int = 3, text: bool = True) -> Batch:
    g = torch.Generator().manual_seed(i)
    x = torch.randn(1, T, F, generator=g)
    # a broken frame inside
    if T > 2:
        x[0, 1, 0] = float("nan")
    streams = {
        "text": Stream(
            torch.randint(0, 99, (1, T + 1), generator=g),
            torch.ones(1, T + 1, dtype=torch.bool),
            torch.rand(1, T + 1, generator=g),
        ),
        "audio": Stream.of(x, rate=100),
    }
    if not text:
        streams["text"] = Stream(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.bool),
            torch.zeros(1, 1),
        )
    return Batch(
        streams,
        {
            "phq8": torch.tensor([float(i)]),
            "emotion": torch.tensor([i % 3]),
            "traits": torch.rand(1, 4, generator=g),
        },
        {
            "id": [f"{i:03d}"],
            "speaker": [f"s{i // 2}"],
            "split": ["train" if i < 4 else "test"],
            "fold": torch.tensor([i % 2]),
            "words": [["hi"] * i],
            "cue": [i],
            "spans": [torch.rand(i, 2, generator=g)],
            "flag": torch.tensor([i > 2]),
        },
    )


def make(folder, items, source=None, **kw) -> Corpus:
    source = source or folder
    return cached(
        CorpusInfo("toy", **kw),
        lambda report: iter(items),
        source,
        [p for p in Path(source).glob("*.txt")],
        cache=folder / "cache",
        progress=False,
    )


def same(a: Batch, b: Batch):
    assert (
        list(a.streams) == list(b.streams)
        and list(a.targets) == list(b.targets)
        and list(a.meta) == list(b.meta)
    )
    for n, s in a.streams.items():
        o = b.streams[n]
        assert (
            s.x.shape == o.x.shape
            and s.x.dtype == o.x.dtype
            and torch.equal(s.mask, o.mask)
            and torch.equal(s.x, o.x)
        )
        assert torch.equal(s.t[s.mask], o.t[o.mask])
    for part in ("targets", "meta"):
        for n, v in getattr(a, part).items():
            o = getattr(b, part)[n]
            if isinstance(v, torch.Tensor):
                assert v.dtype == o.dtype and torch.equal(v, o)
            elif v and isinstance(v[0], torch.Tensor):
                assert all(torch.equal(p, q) for p, q in zip(v, o, strict=True))
            else:
                assert v == o


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    chunk=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rows_come_back_as_they_went_in(tmp_path_factory, sizes, chunk, seed):
    items = [item(i, T, text=bool((i + seed) % 3)) for i, T in enumerate(sizes)]
    whole = collate(items)
    corpus = make(
        tmp_path_factory.mktemp("c"),
        [whole[list(range(i, min(i + chunk, len(items))))] for i in range(0, len(items), chunk)],
    )
    rows = np.random.default_rng(seed).permutation(len(items))[:4].tolist()
    same(whole[rows], corpus[rows])
    same(whole[:], corpus.to_batch())
    same(whole[rows], corpus.select(rows).to_batch())


@pytest.fixture
def corpus(tmp_path):
    return make(tmp_path, [item(i, 2 + i) for i in range(8)])


def test_indexing_and_columns(corpus):
    assert (
        len(corpus) == 8
        and len(corpus[3]) == 1
        and corpus[3].meta["id"] == ["003"]
        and corpus[-1].meta["id"] == ["007"]
    )
    assert corpus[torch.tensor([5, 1])].meta["id"] == ["005", "001"] and corpus[2:4].meta["id"] == [
        "002",
        "003",
    ]
    assert corpus[np.arange(8) > 6].meta["id"] == ["007"]
    assert (
        corpus.column("phq8").tolist() == list(range(8))
        and corpus.column("id")[1] == "001"
        and corpus.targets["emotion"].dtype == torch.int64
    )
    assert (
        corpus.targets["traits"].shape == (8, 4)
        and corpus.meta["flag"].tolist() == [False] * 3 + [True] * 5
    )
    part = corpus.where(split="train", fold=(1,), phq8=lambda v: v > 1)
    assert (
        part.column("id").tolist() == ["003"]
        and part[[0]].targets["phq8"].item() == 3
        and len(corpus.where(split="none")) == 0
    )
    assert "Corpus toy of 8" in repr(corpus) and "audio [T, 3]" in repr(corpus)
    with pytest.raises(ConfigError, match="no column 'age'"):
        corpus.column("age")
    with pytest.raises(IndexError):
        corpus[[8]]


def test_columns_do_not_read_streams(corpus, monkeypatch):
    monkeypatch.setattr(ArrowColumns, "stream", lambda *a: pytest.fail("a stream was read"))
    corpus.targets, corpus.meta, corpus.where(split="train"), list(leave_one_out_rows(corpus))


def test_clock_of_an_even_stream_is_not_stored(tmp_path):
    corpus = make(tmp_path, [item(i, 2 + i) for i in range(3)], rates={"audio": 100})
    assert "audio.t" not in corpus.arrow.column_names and torch.allclose(
        corpus[[2]].streams["audio"].t[0], torch.tensor([0.005, 0.015, 0.025, 0.035])
    )


def test_cached_corpus_parses_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = make(tmp_path, [item(0, 2)])

    def explode(report):
        raise AssertionError("parsed again")

    again = cached(
        "toy", explode, tmp_path, [tmp_path / "a.txt"], cache=tmp_path / "cache", progress=False
    )
    assert again.folder == first.folder
    same(first.to_batch(), again.to_batch())


def test_key_follows_content_options_and_version(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    keys = [make(tmp_path, [item(0, 2)]).folder.name]
    (tmp_path / "a.txt").write_text("two")  # same size, perhaps the same time: the content counts
    keys.append(make(tmp_path, [item(0, 2)]).folder.name)
    os.utime(tmp_path / "a.txt", (1, 1))
    assert make(tmp_path, [item(0, 2)]).folder.name == keys[-1]  # touched, not changed
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2 << 20)
    keys.append(make(tmp_path, [item(0, 2)]).folder.name)
    os.utime(tmp_path / "a.txt", (9, 9))  # a large file is known by its time
    keys += [
        make(tmp_path, [item(0, 2)], **kw).folder.name
        for kw in (
            {},
            {"options": {"unit": "answer"}},
            {"version": 2},
            {"options": {"f": len}},
            {"options": {"f": max}},
        )
    ]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ConfigError, match="cannot be part of a cache key"):
        make(tmp_path, [], options={"x": object()})


def test_nothing_half_written(tmp_path):
    def breaks(report):
        yield item(0, 2)
        raise DataError("row 7 is wrong")

    with pytest.raises(DataError, match="row 7"):
        cached("toy", breaks, tmp_path, [], cache=tmp_path / "cache", progress=False)
    with pytest.raises(KeyboardInterrupt):
        cached(
            "toy",
            lambda r: (_ for _ in ()).throw(KeyboardInterrupt),
            tmp_path,
            [],
            cache=tmp_path / "cache",
            progress=False,
        )
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(DataError, match="no items"):
        make(tmp_path, [])
    with pytest.raises(DataError, match="id 001 occurs twice"):
        make(tmp_path, [item(1, 2), item(1, 3)])
    with pytest.raises(DataError, match="layout"):
        make(tmp_path, [item(1, 2), item(2, 3, F=5)])
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="MMEMO_CACHE"):
        cached(
            "toy",
            lambda r: [item(0, 2)],
            tmp_path,
            [],
            cache=tmp_path / "file" / "x",
            progress=False,
        )


def test_full_disk_is_named(tmp_path):
    def full(report):
        yield item(0, 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="disk .* full"):
        cached("toy", full, tmp_path, [], cache=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("harm", ["truncate", "garbage", "about", "missing"])
def test_damaged_cache_is_named(corpus, harm):
    path = corpus.folder / "data.arrow"
    if harm == "truncate":
        os.truncate(path, path.stat().st_size - 100)
    if harm == "garbage":
        path.write_bytes(os.urandom(path.stat().st_size))
    if harm == "about":
        (corpus.folder / "about.json").write_text("{")
    if harm == "missing":
        path.unlink()
    with pytest.raises(DataError, match="damaged"):
        Corpus(corpus.folder)


def test_two_writers_at_once(tmp_path):
    "While one process parses, another finishes the same corpus: both end with it."

    def slow(report):
        yield item(0, 2)
        make(tmp_path, [item(0, 2)])

    corpus = cached("toy", slow, tmp_path, [], cache=tmp_path / "cache", progress=False)
    assert len(corpus) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_not_one_changed_bit_is_read(tmp_path):
    "Values, layout, rates, times: wherever a byte of the cache changes, it is said."
    draw = random.Random(0)
    corpus = make(tmp_path, [item(i, 3 + i) for i in range(4)], rates={"audio": 100})
    for name in ("data.arrow", "about.json"):
        path = corpus.folder / name
        whole = path.read_bytes()
        # the end of an Arrow file, its first bytes, and places between
        for at in [0, len(whole) - 1, *draw.sample(range(len(whole)), 30)]:
            changed = bytearray(whole)
            changed[at] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            # as another process would find it: nothing has been looked at yet
            corpus_module._CHECKED.clear()
            if name == "about.json" and same_json(whole, bytes(changed)):
                continue
            with pytest.raises(DataError, match="is damaged.*delete this folder"):
                Corpus(corpus.folder)
        path.write_bytes(whole)
    assert len(Corpus(corpus.folder)) == 4


def same_json(one: bytes, other: bytes) -> bool:
    "Whether a change is of blanks only."
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cached(
        "toy", lambda r: [item(0, 2)], tmp_path, [], progress=False
    ).folder.parent == Path("_data/cache")
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "there"))
    assert (
        cached("toy", lambda r: [item(0, 2)], tmp_path, [], progress=False).folder.parent
        == tmp_path / "there"
    )


def test_report_is_kept_and_warned_of(tmp_path):
    def parse(report):
        report.append("409 mended")
        yield item(0, 2)

    def read():
        return cached(
            CorpusInfo("toy", classes={"emotion": ("a", "b")}),
            parse,
            tmp_path,
            [],
            cache=tmp_path / "cache",
            progress=False,
        )

    with pytest.warns(UserWarning, match="1 remarks .* 409 mended"):
        read()
    assert read().report == ["409 mended"] and read().classes == {"emotion": ["a", "b"]}


def test_survives_a_loader_with_workers(corpus, monkeypatch):
    back = pickle.loads(pickle.dumps(corpus.select([3, 1])))
    assert back.column("id").tolist() == ["003", "001"]
    loader = torch.utils.data.DataLoader(
        corpus,
        sampler=[[1, 2], [5]],
        batch_size=None,
        num_workers=1,
        multiprocessing_context=clean_server(monkeypatch),
    )
    assert [b.meta["id"] for b in loader] == [["001", "002"], ["005"]]


def test_reading_is_fast(tmp_path):
    """A batch of 32 sequences of 350 x 25 comes without a conversion per element: far below what a
    Python list of its 280,000 numbers would take.
    """
    corpus = make(
        tmp_path,
        [
            Batch(
                {"audio": Stream.of(torch.randn(64, 350, 25), rate=100)},
                {},
                {"id": [f"{k}{i}" for i in range(64)]},
            )
            for k in range(4)
        ],
    )
    rows, times = np.random.default_rng(0).permutation(256)[:32], []
    for _ in range(15):
        start = time.perf_counter()
        corpus[rows]
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    corpus[rows].streams["audio"].x.tolist()
    slow = time.perf_counter() - start
    assert np.median(times) < slow and np.median(times) < 0.02


# splits


def people(n=60, speakers=11, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    who = np.concatenate([np.arange(speakers), rng.integers(0, speakers, n - speakers)])
    return Batch(
        {"audio": Stream.of(torch.zeros(n, 1, 2), rate=1)},
        {},
        {
            "speaker": [f"p{w}" for w in who],
            "fold": torch.as_tensor(who % 3),
            "id": list(map(str, range(n))),
        },
    )


def test_leave_one_out():
    data = people()
    parts = list(leave_one_out_rows(data))
    assert [name for name, *_ in parts] == sorted(set(data.meta["speaker"]))
    for name, train, test in parts:
        assert (
            {data.meta["speaker"][i] for i in test} == {name}
            and name not in {data.meta["speaker"][i] for i in train}
            and len(train) + len(test) == 60
        )
    assert [name for name, *_ in leave_one_out_rows(data, by="fold")] == [0, 1, 2]
    with pytest.raises(ConfigError, match="no meta field 'session'"):
        next(leave_one_out_rows(data, by="session"))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(20, 80),
    speakers=st.integers(5, 12),
    seed=st.integers(0, 999),
    k=st.integers(2, 5),
)
def test_folds_never_part_a_speaker(n, speakers, seed, k):
    data = people(n, speakers, seed)
    tested = []
    for _, train, test in speaker_folds(data, k, seed=seed):
        check_split(data, train, test)
        assert len(test) and sorted([*train, *test]) == list(range(n))
        tested += test.tolist()
    assert sorted(tested) == list(range(n))
    parts = speaker_split(data, (0.7, 0.2, 0.1), seed=seed)
    check_split(data, *parts)
    assert sorted(np.concatenate(parts)) == list(range(n)) and all(len(p) for p in parts)


def test_splits_are_even_and_repeatable():
    data = people(1000, 100)
    train, valid, test = speaker_split(data, (0.8, 0.1, 0.1), seed=3)
    assert abs(len(train) - 800) < 15 and abs(len(valid) - 100) < 15 and abs(len(test) - 100) < 15
    assert np.array_equal(
        train, speaker_split(data, (0.8, 0.1, 0.1), seed=3)[0]
    ) and not np.array_equal(train, speaker_split(data, (0.8, 0.1, 0.1), seed=4)[0])
    assert (
        max(len(t) for _, _, t in speaker_folds(data, 5))
        - min(len(t) for _, _, t in speaker_folds(data, 5))
        < 12
    )
    with pytest.raises(ConfigError, match="2 groups cannot make 5 parts"):
        list(speaker_folds(people(9, 2), 5))


def test_check_split_names_the_leak():
    data = people(30, 5)
    with pytest.raises(DataError, match="speaker p. stands in part 0 and in part 1"):
        check_split(data, range(15), range(15, 30))


def test_about_is_readable(corpus):
    about = json.loads((corpus.folder / "about.json").read_text())
    assert about["rows"] == 8 and about["layout"]["streams"] == {"text": [], "audio": [3]}


def test_chunks_are_kept_at_once_and_parsed_once(tmp_path):
    """A list of functions, one a chunk: what failed in the middle goes on behind the finished
    chunks, reports included; an empty chunk is one too.
    """
    data, calls = known_answer(6, seed=2), []

    def chunk(number, rows, fails=()):
        def parse(report):
            calls.append(number)
            if number in fails:
                raise DataError("a cable was pulled")
            report.append(f"chunk {number}")
            return data[rows] if rows else None

        return parse

    parts = [[0, 1], [], [2], [3, 4, 5]]

    def read(fails=()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cached(
                CorpusInfo("parts", {"a": 1}),
                [chunk(k, rows, fails) for k, rows in enumerate(parts)],
                ".",
                [],
                cache=tmp_path,
                progress=False,
            )

    with pytest.raises(DataError, match="a cable was pulled"):
        read(fails=(3,))
    assert calls == [0, 1, 2, 3] and not list(tmp_path.glob("parts-*"))
    made = read()
    assert (
        calls == [0, 1, 2, 3, 3]
        and made.report == [f"chunk {k}" for k in range(4)]
        and made.meta["id"] == data.meta["id"]
    )
    assert torch.equal(made.to_batch().streams["audio"].x, data.streams["audio"].x) and [
        p.name[:6] for p in tmp_path.iterdir()
    ] == ["parts-"]
    assert len(read()) == 6 and len(calls) == 5


class Pulled(BaseException):
    "A process that ends here."


def read_chunks(cache, calls=(), fails=(), **options):
    "Six items in three chunks; `calls` gets the numbers of those that are parsed."
    data = known_answer(6, seed=2)

    def chunk(number):
        def parse(report):
            calls.append(number)
            if number in fails:
                raise Pulled
            report.append(f"chunk {number}")
            return data[[2 * number, 2 * number + 1]]

        return parse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parse = [chunk(number) for number in range(3)]
        return cached("parts", parse, ".", [], cache=cache, progress=False, **options)


def flipped(path: Path, place: int) -> None:
    "One bit of a file is another one."
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["1.arrow", "1.json"])
@pytest.mark.parametrize("how", ["first", "middle", "last", "torn", "gone", "empty"])
def test_a_chunk_that_has_changed_is_parsed_again(tmp_path, name, how):
    whole = read_chunks(tmp_path / "whole", [])
    with pytest.raises(Pulled):
        read_chunks(tmp_path / "cache", calls := [], fails=(2,))
    (kept,) = (tmp_path / "cache").glob(".*.chunks")
    file = kept / name
    size = file.stat().st_size
    if how == "gone":
        file.unlink()
    elif how in ("torn", "empty"):
        file.write_bytes(file.read_bytes()[: size - 3 if how == "torn" else 0])
    else:
        flipped(file, {"first": 0, "middle": size // 2, "last": size - 1}[how])
    made = read_chunks(tmp_path / "cache", calls)
    assert calls == [0, 1, 2, 1, 2]
    assert made.report == whole.report == [f"chunk {number}" for number in range(3)]
    assert (made.folder / "data.arrow").read_bytes() == (whole.folder / "data.arrow").read_bytes()


def test_another_reader_that_is_faster_takes_the_chunks_away(tmp_path, monkeypatch):
    real, done = Path.mkdir, []

    def mkdir(self, *args, **options):
        real(self, *args, **options)
        if self.name.endswith(".chunks") and not done:
            done.append(None)
            done[0] = read_chunks(tmp_path, [])

    monkeypatch.setattr(Path, "mkdir", mkdir)
    made = read_chunks(tmp_path, calls := [])
    assert calls == [0] and len(made) == len(done[0]) == 6
    assert made.folder == done[0].folder


def test_a_corpus_in_a_relative_folder_is_found_from_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = read_chunks("cache", [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(pickle.dumps(made.select([4, 1])))
    assert again.meta["id"] == [made.meta["id"][4], made.meta["id"][1]]
