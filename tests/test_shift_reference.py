"""A Reference: the same whatever the parts, in whatever order; from every source; and back from its file unharmed."""

from __future__ import annotations

import datetime
import gzip
import itertools
import json
import os

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.errors import ArgumentError, BatchNormError, DtypeError
from batchnorm.shift import Reference
from batchnorm.shift.categories import MOST_CATEGORIES, Categories
from batchnorm.shift.histogram import MOST_BINS, Histogram, shared
from batchnorm.shift.layer import Layer
from batchnorm.shift.reference import of_layers


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    n = 3000
    return pl.DataFrame(
        {
            "x": rng.normal(1e4, 1.0, n),
            "heavy": rng.standard_cauchy(n),
            "n": rng.integers(0, 30, n),
            "c": rng.choice(["a", "b", None], n).tolist(),
            "flag": rng.random(n) < 0.2,
            "when": [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=int(h)) for h in rng.integers(0, 999, n)],
            "gaps": np.where(rng.random(n) < 0.1, np.nan, rng.normal(size=n)),
        }
    )


def same(one: Reference, other: Reference):
    assert one.rows == other.rows
    assert set(one.columns) == set(other.columns)
    for name, column in one.columns.items():
        twin = other.columns[name]
        assert (column.kind, column.rows, column.missing, column.infinite) == (
            twin.kind,
            twin.rows,
            twin.missing,
            twin.infinite,
        )
        assert column.histogram.level == twin.histogram.level
        assert column.histogram.index.tolist() == twin.histogram.index.tolist()
        assert column.histogram.count.tolist() == twin.histogram.count.tolist()
        assert dict(column.categories.counts) == dict(twin.categories.counts)
        np.testing.assert_allclose(column.moments.mean, twin.moments.mean, rtol=1e-13)
        np.testing.assert_allclose(column.moments.var, twin.moments.var, rtol=1e-9)


@pytest.mark.parametrize("cuts", [(1000,), (1, 2999), (500, 501, 502, 2000)], ids=str)
def test_parts_merge_to_the_whole_in_any_order(table, cuts):
    edges = [0, *cuts, table.height]
    parts = [Reference.of(table[a:b], salt=str(a)) for a, b in itertools.pairwise(edges)]
    whole = Reference.of(table)
    same(parts[0].merge(*parts[1:]), whole)
    same(parts[-1].merge(*parts[:-1]), whole)


def test_moments_are_those_of_numpy(table):
    column = Reference.of(table).columns["x"]
    x = table["x"].to_numpy()
    np.testing.assert_allclose(column.moments.mean, [x.mean()], rtol=1e-14)
    np.testing.assert_allclose(column.moments.var, [((x - x.mean()) ** 2).mean()], rtol=1e-10)


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, max_size=60), st.lists(finite, max_size=60))
def test_a_histogram_depends_on_the_values_alone(left, right):
    whole = Histogram.of(np.array([*left, *right]))
    for one, other in ((left, right), (right, left)):
        first = Histogram.of(np.array(one, dtype=float))
        merged = first.merge(Histogram.of(np.array(other, dtype=float), first.level if one else None))
        assert (merged.index.tolist(), merged.count.tolist()) == (whole.index.tolist(), whole.count.tolist())
        assert merged.level == whole.level or not whole.index.size


def test_a_histogram_keeps_few_bins_and_every_value_in_its_bin():
    values = np.random.default_rng(0).lognormal(0, 3, 50_000)
    found = Histogram.of(values)
    assert MOST_BINS / 4 < found.index.size <= MOST_BINS
    edges = found.values()
    inside = [((values >= low) & (values < low + found.width)).sum() for low in edges]
    assert inside == found.count.tolist()


def test_an_outlier_does_not_coarsen_a_histogram_to_one_bin():
    values = np.append(np.random.default_rng(0).normal(size=10_000), 1e9)
    assert Histogram.of(values).index.size > 1  # 2^-23 of the range is still a bin
    edges, before, after = shared(Histogram.of(values[:-1]), Histogram.of(values))
    assert before.sum() == 10_000
    assert after.sum() == 10_001
    assert (np.diff(edges) > 0).all()


def test_many_categories_merge_exactly_and_are_estimated():
    names = [f"user {i}" for i in range(4 * MOST_CATEGORIES)]
    whole = Categories.of(dict.fromkeys(names, 2))
    parts = [Categories.of(dict.fromkeys(names[i::3], 1)) for i in range(3)]
    united = parts[2].merge(parts[0], parts[1], *parts)
    assert dict(united.counts) == dict(whole.counts)
    assert united.total == whole.total
    assert united.distinct == pytest.approx(len(names), rel=0.1)
    assert not united.is_complete


def test_a_sample_is_spread_over_all_rows_and_bounded():
    table = pl.DataFrame({"row": np.arange(200_000)})
    found = Reference.of(table, sample_rows=1000).sample["row"].to_numpy()
    assert found.size == np.unique(found).size == 1000
    assert abs(found.mean() / 100_000 - 1) < 0.1
    assert np.histogram(found, 10, (0, 200_000))[0].min() > 60


def test_every_source_gives_the_same(table, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    expected = Reference.of(table)
    table.write_parquet(tmp_path / "t.parquet")
    table.write_csv(tmp_path / "t.csv", null_value="NA")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    for source in (table.lazy(), tmp_path / "t.parquet", str(tmp_path / "t.csv"), tmp_path / "t.csv.gz", frame):
        same(Reference.of(source), expected)
    same(Reference.of(table.to_arrow()), expected)


def test_missing_infinite_and_empty_values_are_counted_and_kept_out_of_moments():
    table = pl.DataFrame({"x": [1.0, None, float("nan"), float("inf"), 3.0], "none": [None] * 5})
    found = Reference.of(table)
    assert (found.columns["x"].missing, found.columns["x"].infinite) == (2, 1)
    assert found.columns["x"].moments.mean.tolist() == [2.0]
    assert found.columns["none"].missing == 5
    assert found.columns["none"].is_constant


def test_codes_stay_categories_where_the_reference_says_so(tmp_path):
    (tmp_path / "old.csv").write_text("zip\n007\n010\n")
    (tmp_path / "new.csv").write_text("zip,other\n007,1\n012,2\n")
    old = Reference.of(tmp_path / "old.csv", kinds={"zip": "category"})
    new = Reference.of(tmp_path / "new.csv", like=old)
    assert dict(old.columns["zip"].categories.counts) == {"007": 1, "010": 1}
    assert dict(new.columns["zip"].categories.counts) == {"007": 1, "012": 1}
    assert list(new.columns) == ["zip"]


def test_whole_numbers_may_be_followed_by_others(tmp_path):
    (tmp_path / "t.csv").write_text("x\n" + "1\n" * 20_000 + "2.5\n")
    assert Reference.of(tmp_path / "t.csv").columns["x"].histogram.values().tolist() == [1.0, 2.5]


def test_a_saved_reference_comes_back(table, tmp_path):
    found = Reference.of(table).with_layers({"bn": Layer(np.zeros(3), np.ones(3), None, 1e-5)})
    found.save(tmp_path / "ref.json")
    loaded = Reference.load(tmp_path / "ref.json")
    same(loaded, found)
    assert loaded.sample.equals(found.sample)
    assert loaded.layers["bn"].count is None
    assert loaded.layers["bn"].var.tolist() == [1.0, 1.0, 1.0]


def test_a_reference_is_written_whole_or_not_at_all(table, tmp_path, monkeypatch):
    path = tmp_path / "ref.json"
    Reference.of(table).save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        Reference.of(table.head(10)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["ref.json"]


def rewritten(**changes):
    def change(text):
        return json.dumps({**json.loads(text), **changes})

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text[:-100], "no Reference"),
        (lambda text: "[]", "no Reference"),
        (lambda text: '{"format": "other"}', "no Reference"),
        (rewritten(version=2), "version 2, and this batchnorm reads version 1"),
        (rewritten(rows=17), "checksum"),
        (rewritten(sample="AAAA"), "checksum"),
    ],
    ids=["cut off", "list", "other format", "other version", "other rows", "other sample"],
)
def test_a_damaged_file_is_refused(table, tmp_path, change, match):
    path = tmp_path / "ref.json"
    Reference.of(table).save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ArgumentError, match=match):
        Reference.load(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a,b\n1,2\n3\n", "line 3: expected 2 fields as in the first line, got 1"),
        ("a,b\n1,2\n3,4\n3,4,5\n", "line 4: expected 2 fields as in the first line, got 3"),
        ("a,b\r\n1,2\r\n\r\n", "line 3: expected 2 fields as in the first line, got 1"),
        ('a,b\n"1",2\n\n', "line 3: expected 2 fields as in the first line, got 1"),
        ('a,b\n"x\ny",2\n"z, w"\n', "line 4: expected 2 fields as in the first line, got 1"),
        ("", "is empty"),
        ("a,b\n", "has no rows"),
        ("a\n" + "1\n" * 20_000 + "red\n", "could not parse `red`"),
    ],
    ids=lambda value: value.strip().split("\n")[-1][:20] if "," in value or "\n" in value else "",
)
def test_a_bad_csv_file_is_refused(tmp_path, content, match):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(ArgumentError, match=match):
        Reference.of(tmp_path / "bad.csv")


def test_quoted_separators_and_lines_are_not_ragged(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\r\n"x, y",1\r\n"two\r\nlines",2\r\nplain,3\r\n')
    assert Reference.of(tmp_path / "t.csv").rows == 3


def test_other_bad_input_is_refused(table, tmp_path):
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "t.txt").write_text("a\n1\n")
    with pytest.raises(ArgumentError, match="cannot be read"):
        Reference.of(tmp_path / "bad.parquet")
    with pytest.raises(ArgumentError, match=r"expected a file named \*.csv"):
        Reference.of(tmp_path / "t.txt")
    with pytest.raises(ArgumentError, match="is no file"):
        Reference.of(tmp_path / "none.csv")
    with pytest.raises(DtypeError, match="expected a path, a polars, pandas or Arrow table; got int"):
        Reference.of(3)
    with pytest.raises(DtypeError, match="column 'l' is of type List"):
        Reference.of(pl.DataFrame({"l": [[1]]}))
    with pytest.raises(ArgumentError, match="no columns"):
        Reference.of(pl.DataFrame())
    with pytest.raises(ArgumentError, match="sample_rows must be"):
        Reference.of(table, sample_rows=-1)
    with pytest.raises(ArgumentError, match="lacks 'x'"):
        Reference.of(table.drop("x"), like=Reference.of(table))
    with pytest.raises(ArgumentError, match="expected numbers in column 'x', got String"):
        Reference.of(table.with_columns(pl.lit("a").alias("x")), like=Reference.of(table))
    with pytest.raises(ArgumentError, match="different columns"):
        Reference.of(table).merge(Reference.of(table.drop("x")))
    running = of_layers({"bn": Layer(np.zeros(1), np.ones(1), None, 1e-5)})
    with pytest.raises(BatchNormError, match="know no count and cannot be merged"):
        running.merge(running)
