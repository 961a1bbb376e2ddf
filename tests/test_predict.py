"""`hpo predict` and `load_bundle().predict`: tables, arrays and images in, class names and numbers out."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hpo.objectives.datasets import _image
from hpo.objectives.models import ScalePixels
from hpo.objectives.tabular import FillMissing, KnownCodes
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import hpo
from hpo.cli.app import app
from hpo.errors import DataError, HpoError, InputError
from hpo.export.bundle import export
from hpo.export.columns import Columns, Notes
from hpo.export.model import Model
from hpo.study.blocks import Standardize
from hpo.study.data import DataInfo, Split
from tests.cli import invoke, refused
from tests.conftest import run_hpo

ABOUT = {"study": "s", "objective": "o", "trial": 3, "metrics": {}, "data_fingerprint": "0123"}
COLUMNS = [
    {"name": "age", "kind": "number"},
    {"name": "city", "kind": "category", "categories": ["1", "Basel", "Bern", "True"]},
    {"name": "size", "kind": "number"},
]


class Flats(nn.Module):
    """Two numbers and a code: the sum of all three, as (B, 1)."""

    def forward(self, numeric, categorical):
        return numeric.sum(1, keepdim=True) + 100.0 * categorical


class Each(nn.Module):
    """What fills in missing numbers, and unknown codes."""

    def __init__(self):
        super().__init__()
        self.fill, self.known = FillMissing(torch.tensor([[1.0, 10.0], [3.0, 30.0]])), KnownCodes([5])

    def forward(self, numeric, categorical):
        return self.fill(numeric), self.known(categorical)


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.zero_()
    return layer


def bundle(folder, network, inputs, *, head=None, preprocess=None, link="", about=None, **info):
    """Export a network whose held-out rows are `inputs`; return the folder."""
    info = DataInfo(
        inputs={name: tuple(x.shape[1:]) for name, x in inputs.items()},
        input_dtypes={name: str(x.dtype).removeprefix("torch.") for name, x in inputs.items()},
        **info,
    )
    model = Model(
        preprocess=preprocess or nn.Identity(),
        network=network,
        head=head or nn.Identity(),
        params={},
        info=info,
        about=ABOUT | (about or {}),
        link=link,
    )
    export(model, Split(inputs=inputs, targets=torch.zeros(len(next(iter(inputs.values()))))), folder)
    return folder


ROWS = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 0.25]])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Return the folder of bundles: binary, kinds, scores, flats, plain, pixels."""
    folder = tmp_path_factory.mktemp("bundles")
    ab, x = {"feature_names": ("a", "b")}, {"features": ROWS}
    two, three = ("no", "yes"), ("ant", "bee", "cow")
    scale = Standardize(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    bundle(folder / "binary", linear([[1.0, 1.0]]), x, head=nn.Sigmoid(), preprocess=scale, class_names=two, **ab)
    weight = [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]
    bundle(folder / "kinds", linear(weight), x, link="softmax", class_names=three, **ab)
    bundle(folder / "scores", linear(weight), x, class_names=three, **ab)
    bundle(folder / "plain", linear([[1.0, 2.0]]), x)
    tensors = {"numeric": ROWS, "categorical": torch.tensor([[1], [0], [4]])}
    flats = {"about_the_data": {"columns": COLUMNS}}
    bundle(folder / "flats", Flats(), tensors, preprocess=Each(), about=flats, missing=True)
    pixels = {"pixels": torch.randint(0, 256, (5, 1, 6, 4), dtype=torch.uint8)}
    network = nn.Sequential(nn.Flatten(), nn.AvgPool1d(24))
    bundle(folder / "pixels", network, pixels, preprocess=ScalePixels())
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predicted(*arguments, stdin=None):
    """Return what `hpo predict` prints, as a table of texts."""
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)
    if isinstance(result.exception, HpoError):
        raise result.exception
    assert result.exit_code == 0, result.exception
    return pd.read_csv(io.StringIO(result.stdout), dtype=str, keep_default_na=False)


def test_columns_are_taken_by_name_and_an_id_is_copied_as_it_is_written(bundles, here):
    Path("new.csv").write_text("note,b,id,a\nx,2,007,1\ny,0.5,NA,-3\nz,0.25,,0\n")
    made = predicted(bundles / "binary", "new.csv", "--id", "id")
    assert made.columns.tolist() == ["id", "class", "probability"]
    assert made["id"].tolist() == ["007", "NA", ""]
    assert made["class"].tolist() == ["yes", "no", "no"]
    p = torch.sigmoid((ROWS - 1).sum(1))  # standardised: mean 1, deviation 1
    expected = torch.where(p > 0.5, p, 1 - p)
    assert np.allclose(made["probability"].astype(float), expected, atol=1e-6)


def test_extra_columns_are_said_on_stderr_alone(bundles, here):
    Path("new.csv").write_text("b,extra,a\n2,1,1\n")
    done = run_hpo("predict", bundles / "binary", "new.csv")
    assert done.returncode == 0
    assert done.stdout == "class,probability\nyes,0.7310586\n"
    assert done.stderr == "hpo: columns that the model does not take were ignored: 'extra'\n"


def test_several_classes_have_a_probability_each_or_the_best_few(bundles, here):
    Path("new.csv").write_text("a,b\n1,2\n-3,0.5\n")
    shares = torch.softmax(torch.tensor([[1.0, 2.0, -3.0], [-3.0, 0.5, 2.5]]), 1).numpy()
    made = predicted(bundles / "kinds", "new.csv")
    assert made.columns.tolist() == ["class", "probability_ant", "probability_bee", "probability_cow"]
    assert made["class"].tolist() == ["bee", "cow"]
    assert np.allclose(made.iloc[:, 1:].astype(float), shares, atol=1e-6)  # a logit's softmax: the loss is known
    best = predicted(bundles / "kinds", "new.csv", "--top-k", 2)
    assert best.columns.tolist() == ["class_1", "probability_1", "class_2", "probability_2"]
    assert best[["class_1", "class_2"]].to_numpy().tolist() == [["bee", "ant"], ["cow", "bee"]]
    assert np.allclose(best["probability_2"].astype(float), [shares[0, 0], shares[1, 1]], atol=1e-6)
    scores = predicted(bundles / "scores", "new.csv")
    assert scores.columns.tolist() == ["class", "score_ant", "score_bee", "score_cow"]
    assert scores["score_cow"].astype(float).tolist() == [-3.0, 2.5]


def test_json_lines_and_a_file(bundles, here):
    Path("new.csv").write_text("a,b,id\n1,2,x\n-3,0.5,y\n")
    assert invoke("predict", bundles / "kinds", "new.csv", "--format", "jsonl", "--out", "o", "--id", "id") == ""
    lines = [json.loads(line) for line in Path("o").read_text().splitlines()]
    assert [(line["id"], line["class"]) for line in lines] == [("x", "bee"), ("y", "cow")]
    assert sorted(path.name for path in here.iterdir()) == ["new.csv", "o"]


def test_the_ending_of_out_says_the_format(bundles, here):
    Path("new.csv").write_text("a,b,id\n1,2,x\n")
    given = ("predict", bundles / "kinds", "new.csv", "--out")
    invoke(*given, "o.jsonl")
    assert json.loads(Path("o.jsonl").read_text())["class"] == "bee"
    assert "bee" in invoke(*given, "-")
    assert "not .parquet; name a .csv or .jsonl" in refused(*given, "o.Parquet")
    invoke(*given, "o.gz", "--format", "csv")
    assert sorted(path.name for path in here.iterdir()) == ["new.csv", "o.gz", "o.jsonl"]


FLATS = "city;size;age\n Bern ;1.234,5;2\nZug;;1\n01;10;\nTRUE;0,5;1\n;1;1\n"


def test_a_raw_table_goes_in_as_it_came(bundles, here):
    """Decimal commas, categories that are numbers or truth values, unknown ones, missing values, another order."""
    Path("flats.csv").write_text(FLATS)
    made = predicted(bundles / "flats", "flats.csv")
    assert made["prediction"].astype(float).tolist() == [1536.5, 11.0, 111.0, 401.5, 2.0]
    frame = pd.DataFrame(
        {
            "age": [2, 1, None, 1, 1],
            "size": [1234.5, None, 10, 0.5, 1],
            "city": ["Bern", "Zug", 1, True, None],
        },
        index=list("vwxyz"),
    )
    answer = hpo.load_bundle(bundles / "flats").predict(frame)
    assert answer["prediction"].tolist() == [1536.5, 11.0, 111.0, 401.5, 2.0]
    assert answer.index.tolist() == list("vwxyz")


def test_unknown_categories_are_said(bundles, here):
    Path("flats.csv").write_text(FLATS)
    done = run_hpo("predict", bundles / "flats", "flats.csv", "--out", "/dev/null")
    assert done.returncode == 0
    said = "column 'city': 1 value was not seen in training, and taken as unknown (the first: 'Zug' in row 2)"
    assert done.stderr == f"hpo: {said}\n"


@pytest.mark.parametrize(
    ("texts", "marks"),
    [([0.5, 2.0], (".", "")), ([2.0], (".", "")), (["0.50", "2"], (".", "")), (["0,5", "2,0"], (",", "."))],
)
def test_numbers_that_are_categories_are_known_however_they_are_written(texts, marks):
    about = {"inputs": [{"name": "x", "dtype": "int64", "shape": [None, 1]}], "missing": True}
    half = {"name": "half", "kind": "category", "input": "x", "categories": ["0.5", "1.5", "2.0"]}
    notes = Notes()
    got = Columns(about, [half]).arrays(pd.DataFrame({"half": texts}), "here", 1, notes)
    assert got["x"][:, 0].tolist() == [1, 3][-len(texts) :]
    assert not notes.texts()


@pytest.mark.parametrize("file", [False, True])
def test_columns_that_are_arrows_are_taken_as_others(bundles, here, file):
    arrow = pytest.importorskip("pyarrow") and "pyarrow"
    plain = pd.read_csv(io.StringIO(FLATS), sep=";", decimal=",", thousands=".")
    frame, model = plain.convert_dtypes(dtype_backend=arrow), hpo.load_bundle(bundles / "flats")
    frame.to_parquet("flats.parquet")
    got = predicted(bundles / "flats", "flats.parquet").astype(float) if file else model.predict(frame)
    assert np.allclose(got, model.predict(plain), atol=1e-6)


@pytest.mark.parametrize("kind", ["csv.gz", "tsv", "parquet", "npz", "npy", "pt", "stdin"])
def test_every_kind_of_file_gives_the_same(bundles, here, kind):
    frame = pd.DataFrame(ROWS.numpy(), columns=["a", "b"])
    source = f"new.{kind}"
    if kind == "csv.gz":
        Path(source).write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    elif kind == "tsv":
        frame.to_csv(source, index=False, sep="\t")
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        frame[["b", "a"]].to_parquet(source)
    elif kind == "npz":
        np.savez(source, features=ROWS.numpy())
    elif kind == "npy":
        np.save(source, ROWS.numpy())
    elif kind == "pt":
        torch.save({"features": ROWS}, source)
    else:
        source = "-"
    made = predicted(bundles / "kinds", source, stdin=frame.to_csv(index=False))
    assert made["class"].tolist() == ["bee", "cow", "bee"]
    array = hpo.load_bundle(bundles / "kinds").predict(ROWS)
    assert np.allclose(made.iloc[:, 1:].astype(float), array.iloc[:, 1:], atol=1e-6)


def test_a_counted_index_of_parquet_is_a_column_as_in_training(bundles, here, monkeypatch):
    """pandas writes only how it counts."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("hpo.export.reading.ROWS", 3)
    pd.DataFrame({"b": [0.0] * 7}, index=pd.RangeIndex(5, 19, 2, name="a")).to_parquet("new.parquet")
    made = predicted(bundles / "plain", "new.parquet")["prediction"].astype(float)
    assert made.tolist() == list(range(5, 19, 2))


def test_a_table_is_read_in_chunks_and_rows_are_counted_over_them(bundles, here, monkeypatch):
    monkeypatch.setattr("hpo.export.reading.ROWS", 2)
    Path("new.csv").write_text("a,b\n" + "".join(f"{i},0\n" for i in range(7)))
    assert predicted(bundles / "plain", "new.csv")["prediction"].astype(float).tolist() == list(range(7))
    Path("large.csv").write_text(
        "a,b\n" + "".join(f"{i % 1000},0\n" for i in range(70_000))
    )  # beyond what is looked at
    monkeypatch.setattr("hpo.export.reading.ROWS", 30_000)
    made = predicted(bundles / "plain", "large.csv")["prediction"].astype(float)
    assert np.array_equal(made, np.arange(70_000) % 1000)
    monkeypatch.setattr("hpo.export.reading.ROWS", 2)
    Path("bad.csv").write_text("a,b\n1,2\n1,2\n1,2\n1,oops\n")
    assert refused("predict", bundles / "binary", "bad.csv", "--out", "o").startswith(
        "bad.csv: row 4, column 'b': must be a finite number, but got 'oops'"
    )
    assert not Path("o").exists()


def test_columns_without_names_are_taken_in_their_order(bundles, here):
    Path("new.csv").write_text("q,id,p\n1,9,2\n")
    assert predicted(bundles / "plain", "new.csv", "--id", "id").to_numpy().tolist() == [["9", "5"]]
    assert "takes 2 in their order, but got 3: q, id, p" in refused("predict", bundles / "plain", "new.csv")


def test_images_are_resized_and_named(bundles, here):
    Path("folder").mkdir()
    for name, shade, size in (("b.png", 51, (4, 6)), ("a.jpg", 255, (8, 12))):
        Image.new("RGB", size, (shade,) * 3).save(Path("folder", name))
    made = predicted(bundles / "pixels", "folder")
    assert made["file"].tolist() == ["a.jpg", "b.png"]
    assert np.allclose(made["prediction"].astype(float), [1.0, 0.2])
    assert predicted(bundles / "pixels", "folder/b.png")["file"].tolist() == ["b.png"]
    Path("folder/c.png").write_text("no image")
    assert "c.png: is no image that can be read" in refused("predict", bundles / "pixels", "folder")


def test_an_image_of_16_bits_is_the_same_and_one_of_numbers_is_refused(bundles, here):
    shades = np.full((6, 4), 51, np.uint8)
    Image.fromarray(shades).save("eight.png")
    Image.fromarray(shades.astype(np.uint16) * 257).save("sixteen.png")
    eight, sixteen = (
        predicted(bundles / "pixels", f"{name}.png")["prediction"].item() for name in ("eight", "sixteen")
    )
    assert eight == sixteen == "0.2"
    assert torch.equal(_image(Path("eight.png"), 5, "x"), _image(Path("sixteen.png"), 5, "x"))
    Image.fromarray(shades.astype(np.float32) / 255).save("numbers.tif")
    what = "its pixels are numbers of 32 bits (F); save it with 8 or 16 bits a channel"
    assert what in refused("predict", bundles / "pixels", "numbers.tif")
    with pytest.raises(DataError, match="numbers of 32 bits"):
        _image(Path("numbers.tif"), 5, "x")


BAD = {
    "empty.csv": (b"", "is empty"),
    "blank.csv": (b"\n \n", "is empty"),
    "header.csv": (b"a,b\n", "has a header, but no rows"),
    "missing.csv": (b"c,d\n1,2\n", "2 columns are missing that the model takes: 'a', 'b'; it has c, d"),
    "near.csv": (b"a,B\n1,2\n", "a column is missing that the model takes: 'b'; known: a, B"),
    "gap.csv": (b"a,b\n1,2\n,2\n", "row 2, column 'a': the value is missing, and the model takes none that are"),
    "infinite.csv": (b"a,b\n1,inf\n", "row 1, column 'b': must be a finite number, but got inf"),
    "huge.csv": (b"a,b\n1,1e39\n", "row 1, column 'b': must be a finite number, but got 1e+39"),
    "long.csv": (b"a,b\n" + b"1,2\n" * 20 + b"1,2,3\n", "a row has 3 fields, but its header has 2"),
    "late.csv": (b"a,b\n" + b"1,2\n" * 70000 + b"1,2,3\n", "cannot be read behind row 65536"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "its header names 'a' more than once"),
    "no_names.csv": (b"1,2\n3,4\n", "its first line holds numbers, no names"),
    "zip.csv": (b"PK\x03\x04\x00\x00", "is no text"),
    "cut.csv.gz": (gzip.compress(b"a,b\n1,2\n")[:-6], "cannot be read behind row 0 (EOFError"),
    "bad.parquet": (b"PAR1no", "cannot be read behind row 0"),
    "bad.npz": (b"PKno", "holds no plain arrays or tensors"),
    "bad.pt": (b"\x80\x04.", "holds no plain arrays or tensors"),
    "what.xlsx": (b"PK", "must be .csv, .tsv or .txt"),
    "bad.png": (b"x", "is an image, but the model takes features (2,) in float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_said_in_one_line(bundles, here, name):
    content, message = BAD[name]
    Path(name).write_bytes(content)
    said = refused("predict", bundles / "binary", name)
    assert said.startswith(f"{name}: ")
    assert message in said
    assert len(said.splitlines()) == 1


ARRAYS = {
    "shape": (np.zeros((3, 5)), r"features must be \(N, 2\), but is \(3, 5\)"),
    "row": (np.zeros(2), r"features must be \(N, 2\), but is \(2,\)"),
    "nothing": (np.zeros((0, 2)), "features has no rows"),
    "nan": (np.array([[0, 1], [np.nan, 1]]), "features holds NaN or infinity in row 2"),
    "text": (np.array([["a", "b"]]), "features must be numbers, but is <U1"),
    "name": ({"x": ROWS, "y": ROWS}, "holds no 'features', only 'x', 'y'"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_do_not_fit_are_refused(bundles, name):
    value, message = ARRAYS[name]
    with pytest.raises(InputError, match=message):
        hpo.load_bundle(bundles / "binary").predict(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", 0], "--top-k 0: must be from 1 to the number of classes, 2"),
        (["--top-k", 3], "--top-k 3: must be from 1 to the number of classes, 2"),
        (["--format", "json"], "--format: must be csv or jsonl, but got 'json'"),
        (["--id", "x"], "there is no column 'x' (in --id)"),
        (["--out", "no/where/o.csv"], "--out no/where/o.csv: cannot be written"),
        (["--out", "."], "--out .: is a folder"),
    ],
)
def test_options_that_make_no_sense(bundles, here, options, message):
    Path("new.csv").write_text("a,b\n1,2\n")
    assert message in refused("predict", bundles / "binary", "new.csv", *options)


def test_what_runs_code_when_it_is_unpickled_runs_none(bundles, here):
    class Evil:
        def __reduce__(self):
            return (open, ("ran", "w"))

    torch.save({"features": Evil()}, "evil.pt")
    np.save("evil.npy", np.array([Evil()], dtype=object))
    for name in ("evil.pt", "evil.npy"):
        assert "nothing in it was run" in refused("predict", bundles / "binary", name)
    assert not Path("ran").exists()


def test_a_study_file_stands_for_its_bundle(bundles, study):
    path = study("output: out\nname: binary\n")
    assert "has no bundle there" in refused("predict", path, "new.csv")
    Path("out").mkdir()
    Path("out/bundles").symlink_to(bundles)
    Path("new.csv").write_text("a,b\n1,2\n")
    assert predicted(path, "new.csv")["class"].tolist() == ["yes"]


def test_it_needs_the_bundle_only(bundles, here):
    Path("new.csv").write_text("a,b\n1,2\n")
    code = (
        "import sys; from hpo.cli.app import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'optuna', 'mlflow', 'hpo.objectives', 'hpo.runner', 'hpo.search'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "predict", str(bundles / "binary"), "new.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_said(bundles, here):
    Path("new.csv").write_text("a,b\n1,2\n")
    with pytest.raises(HpoError, match=r"^--out /dev/full: cannot be written \(No space left on device\); make room"):
        predicted(bundles / "binary", "new.csv", "--out", "/dev/full")


@pytest.mark.parametrize("one_each", [False, True])
def test_labels_of_which_a_row_may_have_several_have_each_a_probability(tmp_path, one_each):
    names = ("cat", "dog", "eel")
    targets = torch.eye(3)[torch.arange(30) % 3]
    if not one_each:
        targets[::2, 0] = 1.0
    rows = Split(inputs={"x": torch.randn(30, 2)}, targets=targets)
    info = DataInfo(inputs={"x": (2,)}, input_dtypes={"x": "float32"}, class_names=names)
    model = Model(
        preprocess=nn.Identity(),
        network=linear([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        head=nn.Sigmoid(),
        params={"loss": "bce"},
        info=info,
        about=ABOUT,
    )
    export(model, rows, tmp_path / "b")
    found = hpo.load_bundle(tmp_path / "b").predict(np.array([[3.0, 2.0]], dtype=np.float32))
    labels = [f"probability_{name}" for name in names]
    assert list(found.columns) == (["class", *labels] if one_each else labels)
    assert found[labels].to_numpy()[0] == pytest.approx(torch.tensor([3.0, 2.0, 5.0]).sigmoid().numpy(), abs=1e-6)
