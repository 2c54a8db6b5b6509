"""Numbers of different types meet without loss; rows are chosen by whatever names them."""

import numpy as np
import pytest
import torch

from mmemo.core.batch import Batch, Stream, align, collate, masked_mean, masked_std, text_stream
from mmemo.core.errors import DataError, ShapeError
from mmemo.core.rows import as_native, common_type, meet_types, row_array, row_numbers
from mmemo.data.arrow import ArrowWriter, to_arrow
from mmemo.data.cmu import read_cmu_table
from mmemo.data.corpus import cached

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
WHOLE += [torch.uint16, torch.uint32]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def numbers(*values, kind=None):
    return Stream.of(torch.tensor([values], dtype=kind)[..., None], rate=10)


# each: values and their type, and those that they are joined with
PAIRS = {
    "int16 and a half of one": ((1000, -1000), torch.int16, (0.5, -0.5), torch.float32),
    "uint8 and a share": ((255, 0), torch.uint8, (0.8, 0.25), torch.float32),
    "uint8 and a negative number": ((255, 3), torch.uint8, (-1, -128), torch.int8),
    "half and a large number": ((0.5, 2.0), torch.float16, (1e6, -1e6), torch.float32),
    "half and a large whole number": ((0.5, 2.0), torch.float16, (30_001, -7), torch.int16),
    "half and bfloat16": ((0.1, 2049.0), torch.float16, (1e30, 3.0), torch.bfloat16),
    "bool and a float": ((True, False), torch.bool, (0.5, 0.25), torch.float32),
    "float and double": ((0.1, 2.0), torch.float32, (1e300, 1e-300), torch.float64),
    "int32 and a float": ((2**24 + 1, 7), torch.int32, (0.5, 0.25), torch.float32),
    "int64 and a float": ((2**40 + 1, 7), torch.int64, (0.5, 0.25), torch.float32),
    "uint16 and int16": ((65_535, 0), torch.uint16, (-5, 5), torch.int16),
    "uint16 and a half": ((65_535, 2049), torch.uint16, (0.5, 0.25), torch.float16),
    "int64 and int8": ((2**40, 1), torch.int64, (-5, 5), torch.int8),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_collate_loses_no_number(pair, backwards):
    one, kind, two, other = PAIRS[pair]
    parts = [numbers(*one, kind=kind), numbers(*two, kind=other)]
    values = [part.x.double() for part in parts]
    if backwards:
        parts, values = parts[::-1], values[::-1]
    ids = [["a"], ["b"]]
    targets = [{"y": part.x[:, 0, 0]} for part in parts]
    whole = collate([Batch({"audio": p}, y, {"id": i}) for p, y, i in zip(parts, targets, ids)])
    assert torch.equal(whole.streams["audio"].x.double(), torch.cat(values))
    assert torch.equal(whole.targets["y"].double(), torch.cat(values)[:, 0, 0])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_corpus_loses_no_number(pair, tmp_path):
    one, kind, two, other = PAIRS[pair]
    parts = [numbers(*one, kind=kind), numbers(*two, kind=other)] * 2
    batches = [
        Batch({"audio": part}, {"y": part.x[:, 0, 0], "z": part.x[:, 0]}, {"id": [f"i{k}"]})
        for k, part in enumerate(parts)
    ]
    chunks = [lambda report, batch=batch: batch for batch in batches]
    for n, parse in enumerate([lambda report: iter(batches), chunks]):
        made = cached(f"c{n}", parse, tmp_path, [], cache=tmp_path / "c", progress=False)
        want = torch.cat([part.x.double() for part in parts])
        got = made.to_batch()
        assert torch.equal(got.streams["audio"].x.double(), want)
        assert torch.equal(got.targets["y"].double(), want[:, 0, 0])
        assert torch.equal(got.targets["z"].double(), want[:, 0])
        assert got.meta["id"] == ["i0", "i1", "i2", "i3"]


@pytest.mark.parametrize("kind", [*WHOLE, *FLOATS, torch.bool])
def test_one_type_stays_what_it_is(kind):
    item = Batch({"audio": numbers(1, 0, kind=kind)}, {"y": torch.tensor([1], dtype=kind)})
    whole = collate([item, item])
    assert whole.streams["audio"].x.dtype == kind and whole.targets["y"].dtype == kind


@pytest.mark.parametrize("one", [*WHOLE, *FLOATS, torch.bool])
@pytest.mark.parametrize("other", [*WHOLE, *FLOATS, torch.bool])
def test_types_meet_in_either_order_and_never_in_whole_numbers_beside_a_float(one, other):
    met = meet_types(one, other)
    assert met == meet_types(other, one)
    assert met.is_floating_point == (one.is_floating_point or other.is_floating_point)
    if one.is_floating_point and other.is_floating_point:
        assert met == torch.promote_types(one, other)


def test_what_fits_into_float32_stays_there():
    assert common_type([torch.tensor([-100, 3]), torch.tensor([0.5])]) == torch.float32
    assert common_type([torch.tensor([2**24 + 1]), torch.tensor([0.5])]) == torch.float64


def test_fields_of_other_shapes_say_so():
    one = Batch({"audio": numbers(1.0)}, {"y": torch.zeros(1, 2)})
    two = Batch({"audio": numbers(1.0)}, {"y": torch.zeros(1, 3)})
    with pytest.raises(ShapeError, match="'y' has another shape .*2.* and .*3"):
        collate([one, two])
    told = [Batch({"audio": numbers(1.0)}, {}, {"s": s}) for s in (torch.tensor([2]), [0.5])]
    assert collate(told).meta["s"] == [2, 0.5]


# ------------------------------------------------------------------ fields known late
def test_a_field_that_is_known_late_comes_in_its_type(tmp_path):
    fields = [[None, None], ["ann", None], [None, "bob"]]
    marks = [[None, None], [3, 4], [0.5, None]]
    words = [[None, ["a"]], [["b", "c"], None], [[], None]]
    chunks = [
        lambda report, k=k: Batch(
            {"audio": Stream.of(torch.zeros(2, 1, 1), rate=1)},
            {},
            {"id": [f"{k}0", f"{k}1"], "who": fields[k], "mark": marks[k], "words": words[k]},
        )
        for k in range(3)
    ]
    made = cached("c", chunks, tmp_path, [], cache=tmp_path / "c", progress=False)
    assert made.meta["who"] == sum(fields, []) and made.meta["mark"] == sum(marks, [])
    assert made.meta["words"] == sum(words, [])


def test_text_beside_numbers_is_one_clear_error(tmp_path):
    def batch(name, mark):
        x = Stream.of(torch.zeros(len(mark), 1, 1), rate=1)
        return Batch({"audio": x}, {}, {"id": [name + str(k) for k in range(len(mark))], "m": mark})

    with pytest.raises(DataError, match="m: values of several kinds"):
        to_arrow(batch("a", ["x", 3]), {})
    writer = ArrowWriter(tmp_path / "a.arrow")
    writer.write(to_arrow(batch("a", ["x"]), {})[0])
    with pytest.raises(DataError, match="meta.m holds string .* int64"):
        writer.write(to_arrow(batch("b", [3]), {})[0])
    writer.close()


# ------------------------------------------------------------------ arrays of other programs
@pytest.mark.parametrize("kind", [">f4", ">f8", ">i2", ">i4", "<f4", "f2", ">u2"])
@pytest.mark.parametrize("step", [1, -1, 2])
def test_arrays_of_any_byte_order_and_stride(kind, step):
    x = np.arange(24).reshape(2, 4, 3).astype(kind)[:, ::step, ::step]
    t = np.arange(4).astype(">f8")[::step][None].repeat(2, 0)
    mask = np.array([[True, True, False, True]] * 2)[:, ::step]
    s = Stream.of(x, mask, t)
    want = np.where(mask[..., None], x, 0) if np.dtype(kind).kind == "f" else x
    assert np.array_equal(s.x.double().numpy(), want.astype(float))
    assert np.array_equal(s.t.numpy(), t.astype("f4")) and np.array_equal(s.mask.numpy(), mask)
    assert torch.equal(as_native([row for row in x]), as_native(x))


def test_tokens_of_another_byte_order():
    def tokens(words, spans):
        return np.array([3, 1, 2], ">i4")[::-1], np.array([0, 1, 2], ">f8")

    stream = text_stream(tokens, [["a"]], [None])
    assert stream.x.tolist() == [[2, 1, 3]] and stream.t.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", [">f4", ">f8", ">i2", "<f4"])
def test_a_table_of_another_byte_order(tmp_path, kind):
    np.savez(
        tmp_path / "t.npz",
        audio_train=np.full((3, 4, 2), 2, kind),
        y_train=np.array([1, 2, 3], ">f8"),
        id_train=np.array(["a", "b", "c"], ">U1"),
    )
    made = read_cmu_table(tmp_path / "t.npz", cache=tmp_path / "c", progress=False).to_batch()
    assert made.streams["audio"].x.eq(2).all() and made.targets["rating"].tolist() == [1, 2, 3]
    assert made.meta["id"] == ["a", "b", "c"]


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize("columns", [[5], [0, 2]])
def test_a_column_that_is_finite_nowhere_does_not_silence_the_others(tmp_path, value, columns):
    x = np.random.default_rng(0).normal(size=(4, 5, 7))
    x[:, :, columns] = value
    x[1, 2, 3] = np.nan
    np.savez(tmp_path / "t.npz", audio_train=x, y_train=np.ones(4), text_train=np.ones((4, 5, 2)))
    made = read_cmu_table(tmp_path / "t.npz", cache=tmp_path / "c", progress=False)
    audio = made.to_batch().streams["audio"]
    assert (~audio.mask).nonzero().tolist() == [[1, 2]]
    assert audio.x[..., columns].eq(0).all() and audio.x[0, 0, 1 if 5 in columns else 3] != 0
    assert f"audio: columns {columns} are finite nowhere: taken as 0" in made.report
    assert "audio: 1 steps hold values that are not finite: they are not real" in made.report


# ------------------------------------------------------------------ means
def test_bytes_and_halves_are_averaged_without_overflow():
    clock = Stream.of(torch.zeros(1, 1, 1), t=torch.zeros(1, 1))
    for kind, value in ((torch.uint8, 250), (torch.int16, 30_000), (torch.float16, 60_000)):
        many = Stream.of(torch.full((1, 300, 1), value, dtype=kind), rate=100)
        assert align(many, clock).x.item() == value, kind
        assert masked_mean(many.x, many.mask).item() == value
    x = torch.tensor([[[1], [2]]], dtype=torch.int16)
    assert masked_std(x, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(0.5, abs=1e-3)


# ------------------------------------------------------------------ rows
@pytest.mark.parametrize(
    "none",
    [[], (), np.array([]), torch.tensor([]), slice(0, 0), np.zeros(4, bool), torch.zeros(4) > 1],
)
def test_no_rows_are_an_empty_batch(none):
    batch = Batch({"audio": numbers(1.0)}, {"y": torch.zeros(1)}, {"id": ["a"]})
    batch = collate([batch] * 4)
    empty = batch[none]
    assert len(empty) == 0 and empty.meta["id"] == [] and empty.targets["y"].shape == (0,)
    assert "Batch of 0" in repr(empty) and len(collate([empty, batch])) == 4


@pytest.mark.parametrize(
    "rows",
    [
        [2, 0],
        np.array([2, 0], np.uint8),
        np.array([2, 0], ">i4"),
        np.array([0, 2])[::-1],
        np.array([2.0, 0.0]),
        torch.tensor([2, 0], dtype=torch.uint8),
        torch.tensor([2, 0], dtype=torch.int32),
    ],
)
def test_rows_are_named_by_any_whole_numbers(rows):
    batch = Batch({"audio": Stream.of(torch.arange(4.0).reshape(4, 1, 1), rate=1)})
    assert batch[rows].streams["audio"].x.flatten().tolist() == [2, 0]
    assert row_array(rows).tolist() == row_numbers(rows, "rows", 4).tolist() == [2, 0]


def test_rows_that_are_no_whole_numbers_are_refused():
    batch = Batch({"audio": Stream.of(torch.zeros(4, 1, 1), rate=1)})
    for rows in (np.array([0.5]), np.array([1.0, np.nan]), torch.tensor([1.25])):
        with pytest.raises(DataError, match="row numbers are whole numbers"):
            batch[rows]
