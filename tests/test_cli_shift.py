"""`batchnorm shift`: exit statuses, files written whole or not at all, and clear errors for bad ones."""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from batchnorm.cli.app import main
from batchnorm.shift import Reference


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)

    def make(rows, shift=0.0):
        x = rng.normal(size=(rows, 3)) + np.array([shift, 0, 0])
        kind = rng.choice(["red", "green", None], rows).tolist()
        return pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "kind": kind, "y": 2 * x[:, 0] + x[:, 1]})

    make(400).write_csv("old.csv")
    make(400).write_csv("same.csv")
    make(400, 1.0).write_parquet("moved.parquet")
    make(60, 1.0).write_csv("few.csv")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["batchnorm", "shift", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


@pytest.fixture
def shift(folder, monkeypatch, capsys):
    def call(*arguments):
        return run(monkeypatch, capsys, *arguments)

    assert call("reference", "old.csv", "-o", "ref.json")[0] == 0
    return call


def test_no_shift_is_status_0_and_a_shift_status_1(shift):
    status, out, _ = shift("compare", "ref.json", "same.csv")
    assert status == 0
    assert out.startswith("No shift over the threshold effect>0.1")
    status, out, _ = shift("compare", "ref.json", "moved.parquet")
    assert status == 1
    assert next(line for line in out.splitlines() if line.startswith("a ")).endswith("SHIFTED")


def test_json_is_all_that_is_printed_and_holds_every_number(shift):
    status, out, _ = shift("compare", "ref.json", "moved.parquet", "--json", "--target", "y", "--fail-on", "auc>0.99")
    found = json.loads(out)
    assert status == 0
    assert (found["rule"], found["is_shifted"], found["is_significant"]) == ("auc>0.99", False, True)
    by_name = {one["name"]: one for one in found["variables"]}
    assert by_name["a"]["effect"]["mean_difference"] == pytest.approx(1.0, abs=0.35)
    assert by_name["y"]["left_out"] == "target"
    assert found["shift_type"]["name"] == "covariate"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_the_report_asks_for_nothing_and_does_not_grow_with_the_rows(shift):
    assert shift("compare", "ref.json", "moved.parquet", "-o", "report.html")[0] == 1
    text = Path("report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert page.tags.count("svg") > 5
    assert "moved.parquet" in page.text
    pl.concat([pl.read_parquet("moved.parquet")] * 20).write_parquet("more.parquet")
    assert shift("compare", "ref.json", "more.parquet", "-o", "more.html")[0] == 1
    assert len(Path("more.html").read_text(encoding="utf-8")) < 1.2 * len(text)


def test_a_report_escapes_names(folder, monkeypatch, capsys):
    pl.read_csv("old.csv").rename({"a": "<script>x</script>"}).write_csv("odd.csv")
    assert run(monkeypatch, capsys, "reference", "odd.csv", "-o", "odd.json")[0] == 0
    assert run(monkeypatch, capsys, "compare", "odd.json", "odd.csv", "-o", "odd.html")[0] == 0
    page = Path("odd.html").read_text(encoding="utf-8")
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page


def test_parts_are_one_table_here_and_on_dask(folder, monkeypatch, capsys):
    whole = pl.concat([pl.read_csv("old.csv"), pl.read_csv("same.csv")])
    whole.write_parquet("whole.parquet")
    assert run(monkeypatch, capsys, "reference", "old.csv", "same.csv", "-o", "parts.json")[0] == 0
    made = [Reference.load("parts.json")]
    if dask := pytest.importorskip("dask"):
        with dask.config.set(scheduler="threads", num_workers=2):
            assert (
                run(monkeypatch, capsys, "reference", "old.csv", "same.csv", "-o", "d.json", "--engine", "dask")[0] == 0
            )
        made.append(Reference.load("d.json"))
    expected = Reference.of("whole.parquet")
    for found in made:
        assert found.rows == 800
        for name, column in expected.columns.items():
            assert found.columns[name].histogram.count.tolist() == column.histogram.count.tolist()
            assert found.columns[name].categories.counts == column.categories.counts
            np.testing.assert_allclose(found.columns[name].moments.var, column.moments.var, rtol=1e-12)
    assert made[0].sample.equals(made[-1].sample)


def test_parts_are_one_table_on_spark(folder, monkeypatch, capsys):
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if shutil.which("java") is None:
        pytest.skip("pyspark needs Java, which is not installed")
    warnings.simplefilter("ignore", FutureWarning)
    parts = ("reference", "old.csv", "same.csv", "-o")
    assert run(monkeypatch, capsys, *parts, "spark.json", "--engine", "spark")[0] == 0
    assert run(monkeypatch, capsys, *parts, "here.json")[0] == 0
    assert Path("spark.json").read_bytes() == Path("here.json").read_bytes()
    status, _, err = run(monkeypatch, capsys, "reference", "old.csv", "few.tsv", "-o", "x.json", "--engine", "spark")
    assert status == 2
    assert "few.tsv is no file" in err


def test_what_counts_as_missing_is_remembered(folder, monkeypatch, capsys):
    """Read with other signs for missing values on either side, a table that has not moved has."""
    table = pl.read_csv("old.csv").with_columns(kind=pl.col("kind").fill_null("?"))
    table.write_csv("marks.csv")
    assert run(monkeypatch, capsys, "reference", "marks.csv", "-o", "marks.json", "--null", "?")[0] == 0
    assert Reference.load("marks.json").columns["kind"].missing > 50
    assert run(monkeypatch, capsys, "compare", "marks.json", "marks.csv", "--json")[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("ragged.csv", "a,b,c,kind,y\n1,2,3,red,4\n1,2\n", "line 3: expected 5 fields as in the first line, got 2"),
        ("types.csv", "a,b,c,kind,y\nred,2,3,red,4\n", "could not parse `red`"),
        ("empty.csv", "", "is empty"),
        ("header.csv", "a,b,c,kind,y\n", "has no rows"),
        ("other.csv", "d,e\n1,2\n", "lacks 'a', 'b', 'c', 'kind', 'y'; it has 'd', 'e'"),
        ("broken.parquet", "PAR1 nothing", "cannot be read"),
        ("nothing.csv", None, "is no file"),
        ("table.xlsx", "x", r"expected a file named *.csv, *.csv.gz or *.parquet"),
        ("foreign.json", "{}", "is no Reference"),
        ("twice.csv", "a,b,a\n1,2,3\n", "has two columns named 'a'"),
        ("semicolons.csv", "a;b\n1;2\n", "seems to be separated by ';'"),
        ("latin.csv", "a,b\xe9\n1,2\n".encode("latin-1"), "is no UTF-8 text"),
        ("utf16.csv", "a,b\n1,2\n".encode("utf-16"), "is no UTF-8 text"),
        ("cut.csv.gz", gzip.compress(b"a,b,c,kind,y\n" + b"1,2,3,red,4\n" * 999)[:-9], "is no whole gzip file"),
        ("plain.csv.gz", "a,b\n1,2\n", "is no whole gzip file"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 16 else "",
)
def test_a_bad_table_is_status_2_and_writes_nothing(shift, folder, name, content, match):
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(folder.iterdir())
    status, out, err = shift("compare", "ref.json", name, "-o", "report.html")
    assert status == 2
    assert err.startswith("Error: ")
    assert match in err
    assert not out
    assert sorted(folder.iterdir()) == before


def test_a_bad_reference_is_status_2(shift, folder):
    text = (folder / "ref.json").read_text()
    (folder / "cut.json").write_text(text[:-50])
    (folder / "v9.json").write_text(text.replace('"version": 1', '"version": 9', 1))
    (folder / "bent.json").write_text(text.replace('"rows": 400', '"rows": 401', 1))
    for name, match in (("cut", "no JSON"), ("v9", "version 9"), ("bent", "checksum"), ("none", "is no file")):
        status, _, err = shift("compare", f"{name}.json", "same.csv")
        assert status == 2
        assert match in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("reference", "old.csv", "-o", "ref.json"), "exists: pass --force"),
        (("reference", "old.csv", "-o", "no/ref.json"), "does not exist"),
        (("reference", "old.csv", "same.txt", "-o", "x.json"), "same.txt is no file"),
        (("compare", "ref.json", "same.csv", "-o", "report.pdf"), "expected -o *.html or *.json"),
        (("compare", "ref.json", "same.csv", "--fail-on", "much"), "fail_on must be MEASURE>NUMBER"),
        (("compare", "ref.json", "same.csv", "--target", "z"), "no column 'z'"),
        (("treat", "ref.json", "moved.parquet", "--target", "z"), "no column 'z'"),
        (("treat", "ref.json", "moved.parquet", "--target", "y", "--time", "a"), "time and block go together"),
        (("reference", "huge.csv", "-o", "x.json"), "the values in column 'a' are too large for a variance"),
        (("reference", "key.csv", "-o", "x.json"), "a column is named '__key__'"),
        (("treat", "ref.json", "moved.parquet", "--target", "y", "-o", "w.csv"), "expected -o *.parquet"),
        (
            ("treat", "ref.json", "moved.parquet", "--target", "y", "--labels", "tiny.csv"),
            "at least 10 labelled rows, got 3",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_status_2(shift, folder, arguments, match):
    pl.read_csv("few.csv").head(3).write_csv("tiny.csv")
    (folder / "huge.csv").write_text("a\n1e300\n-1e300\n")
    (folder / "key.csv").write_text("__key__\n1\n2\n")
    before = sorted(folder.iterdir())
    status, _, err = shift(*arguments)
    assert status == 2
    assert match in err
    assert sorted(folder.iterdir()) == before


def test_treat_without_labels_recommends_nothing(shift):
    status, out, _ = shift("treat", "ref.json", "moved.parquet", "--target", "y", "-o", "w.parquet", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["adopted"] is None
    assert found["written"] is None
    assert 0 < found["overlap"] < 1
    weighted = [one for one in found["candidates"] if one["effective_sample_size"] is not None]
    assert len(weighted) == 4


def test_treat_writes_the_weights_that_it_adopts(shift, monkeypatch):
    monkeypatch.setattr(importlib.import_module("batchnorm.shift.treat"), "adopted", lambda evidence: "uLSIF weights")
    status, out, _ = shift(
        "treat", "ref.json", "moved.parquet", "--target", "y", "--labels", "few.csv", "-o", "w.parquet"
    )
    assert status == 0
    assert "Adopted: uLSIF weights" in out
    table = pl.read_parquet("w.parquet")
    assert table.height == 400
    assert table["weight"].mean() == pytest.approx(1.0)
    # The new rows lie higher in a, and so do the weights.
    assert np.corrcoef(table["a"], table["weight"])[0, 1] > 0.4


def test_treat_says_that_a_file_was_not_written(shift, monkeypatch):
    monkeypatch.setattr(importlib.import_module("batchnorm.shift.treat"), "adopted", lambda evidence: None)
    status, out, _ = shift(
        "treat", "ref.json", "moved.parquet", "--target", "y", "--labels", "few.csv", "-o", "w.parquet"
    )
    assert status == 0
    assert "Not written: w.parquet" in out
    assert not Path("w.parquet").exists()


NETWORK = """
import torch
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[2.0, 1.0, 0.0]])); net[1].bias.zero_()
    return net
"""


@pytest.fixture
def network(folder):
    """y = 2 a + b of standardised inputs; the new rows' inputs are scaled and moved, and their target is not."""
    (folder / "net_of_shift.py").write_text(NETWORK)
    rng = np.random.default_rng(0)

    def make(rows, name, scale, shift):
        x = rng.normal(size=(rows, 3))
        y = 2 * x[:, 0] + x[:, 1]
        pl.DataFrame({**{k: x[:, i] * scale + shift for i, k in enumerate("abc")}, "y": y}).write_csv(name)

    make(400, "n_old.csv", 1, 0)
    make(400, "n_new.csv", 3, 5)
    make(50, "n_few.csv", 3, 5)
    make(50, "n_few_old.csv", 1, 0)
    sys.modules.pop("net_of_shift", None)
    return ("--model", "net_of_shift:make")


def test_layers_stand_in_the_same_table_as_columns(shift, network):
    assert shift("reference", "n_old.csv", "-o", "n.json", "--target", "y", *network)[0] == 0
    assert Reference.load("n.json").layers["0"].mean.shape == (3,)
    status, out, _ = shift("compare", "n.json", "n_new.csv", "--target", "y", "--json", *network)
    found = {one["name"]: one for one in json.loads(out)["variables"]}
    assert status == 1
    assert found["0"]["kind"] == "layer"
    assert found["0"]["is_shifted"]
    status, out, _ = shift("compare", "n.json", "n_old.csv", "--target", "y", *network)
    assert status == 0


def test_recalibrated_statistics_are_adopted_on_evidence_only(shift, network):
    assert shift("reference", "n_old.csv", "-o", "n.json", "--target", "y", *network)[0] == 0
    common = ("--target", "y", *network)
    status, out, _ = shift("treat", "n.json", "n_new.csv", *common, "--labels", "n_few.csv", "-o", "m.safetensors")
    assert status == 0
    assert "Adopted: recalibrated statistics" in out
    tensors = safetensors.torch.load_file("m.safetensors")
    torch.testing.assert_close(tensors["0.running_mean"], torch.full((3,), 5.0), atol=0.5, rtol=0)
    status, out, _ = shift("treat", "n.json", "n_old.csv", *common, "--labels", "n_few_old.csv", "-o", "no.safetensors")
    assert status == 0
    assert "Do nothing" in out
    assert not Path("no.safetensors").exists()
    status, out, _ = shift("treat", "n.json", "n_new.csv", *common, "-o", "none.safetensors")
    assert "No recommendation" in out
    assert not Path("none.safetensors").exists()


def test_a_network_that_does_not_take_the_table_is_status_2(shift, network):
    status, _, err = shift("reference", "n_old.csv", "-o", "n.json", *network)
    assert status == 2
    assert "the model does not take the 4 numeric columns a, b, c, y" in err
    status, _, err = shift("reference", "n_old.csv", "-o", "n.json", "--model", "net_of_shift:nothing")
    assert status == 2
    assert "has no 'nothing'" in err
