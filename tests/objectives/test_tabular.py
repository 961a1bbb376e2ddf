"""One's own table: whatever a file looks like there is a model, or one line that says what is wrong and what to do."""

import gzip
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hpo.objectives.datasets import rows_of_splits
from hpo.objectives.table_files import read_table
from hpo.objectives.tables import encode

from hpo.errors import DataError
from hpo.objectives import table_files
from hpo.study.loading import load
from tests.conftest import run_hpo

N = 60


def rows(**more) -> pd.DataFrame:
    """A table of two numbers, a category and a price that they give."""
    random = np.random.RandomState(0)
    age, height = random.randint(20, 60, N), random.normal(1.7, 0.1, N).round(3)
    city = np.array(["Bern", "Basel", "Zürich"])[np.arange(N) % 3]
    price = (age + 100 * height + 20 * (np.arange(N) % 3)).round(2)
    return pd.DataFrame({"age": age, "height": height, "city": city, "price": price}).assign(**more)


def csv(**how) -> str:
    return rows().to_csv(index=False, **how)


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a file and makes the objective of it; a failed one raises DataError."""

    def make(content, name="table.csv", **options):
        file = tmp_path / name
        if isinstance(content, pd.DataFrame):
            content = content.to_csv(index=False)
        if content is not None:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        objective, faults = load("tabular", {"file": str(file), "target": "price"} | options, Path())
        if faults:
            raise DataError(faults[0].message)
        objective.info = objective.data().checked("tabular").info
        return objective

    return make


def refused(make, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        make(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SAME = {
    "semicolons and decimal commas": csv(sep=";", decimal=","),
    "tabs": csv(sep="\t"),
    "bars": csv(sep="|"),
    "a byte order mark": csv().encode("utf-8-sig"),
    "utf-16": csv().encode("utf-16"),
    "windows": csv(lineterminator="\r\n").encode("cp1252"),
    "everything in quotes": csv(quoting=1),
    "blanks": csv().replace(",", ", "),
    "blank lines": csv().replace("\n", "\n\n"),
    "row numbers": rows().to_csv(),
    "separators at the ends": csv().replace("\n", ",\n"),
    "a column of one value, one of nothing": rows(one=1, none=np.nan).to_csv(index=False),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_however_it_is_written_it_is_the_same_data(make, content):
    assert make(content).data().fingerprint() == make(csv()).data().fingerprint()


def test_compressed_files_and_parquet_are_the_same_data_too(make, tmp_path):
    expected = make(csv()).data().fingerprint()
    assert make(gzip.compress(csv().encode()), "table.csv.gz").data().fingerprint() == expected
    rows().to_parquet(tmp_path / "table.parquet")
    assert make(None, "table.parquet").data().fingerprint() == expected


def wide(n_columns, separator, name, n_rows=30):
    """A table of many columns, the last of which is `y`."""
    names = (f'"{name}{i}"' if set(name) & set('\n,;\t"') else f"{name}{i}" for i in range(n_columns))
    lines = [separator.join([*names, "y"])]
    for r in range(n_rows):
        lines.append(separator.join([*(str(i * (r + 1) % 97) for i in range(n_columns)), str(r + 0.5)]))
    return "\n".join(lines) + "\n"


COLUMNS = {
    "short": (5_000, "c"),
    "quoted": (5_000, "a name, with\na line and a " * 8),
    "long": (20_000, "a_rather_long_name_of_a_column_"),
    "many": (20_000, "c"),
}


@pytest.mark.parametrize(
    ("n_columns", "name", "separator"),
    [
        pytest.param(*COLUMNS[kind], separator, id=f"{kind}-{separator}", marks=() if by_default else pytest.mark.slow)
        for kind, separators in {"short": ";", "quoted": ",", "long": "", "many": ""}.items()
        for separator in ",\t;"
        for by_default in [separator in separators]
    ],
)
def test_a_table_may_have_many_columns(make, n_columns, name, separator):
    begun = time.process_time()
    objective = make(wide(n_columns, separator, name), "table.tsv", target="y", task="regression")
    data = objective.data()
    useless = sum(i % 97 in (0, 1) for i in range(n_columns))  # 0 in all rows, and 1, 2, 3, ...
    assert data.train.inputs["numeric"].shape[1] == n_columns - useless
    assert data.feature_names[0].strip() == f"{name}2".strip()
    assert time.process_time() - begun < 20  # it takes two; some milliseconds for each column took minutes


def test_what_is_wrong_with_one_of_many_columns_is_said(make):
    frame = pd.DataFrame(np.arange(300.0 * N).reshape(N, 300)).add_prefix("c").assign(price=range(N))
    for value, why in ((1e300, "column 'c7' holds infinity, or more than 3e38, in 1 of 60 rows (the first: row 5)"),):
        frame.loc[4, "c7"] = value
        assert why in refused(make, frame, task="regression")


def test_a_column_that_float32_rounds_is_said(make):
    frame = rows(far=1e9 + np.linspace(0, 9, N), whole=2.0**23 + np.arange(N)[::-1], id=1e12 + 1e9 * np.arange(N))
    notices = make(frame, keep=["id"]).data().notices
    assert len(notices) == 1
    assert notices[0].startswith("column 'far' lies between 1000000000 and 1000000009, where")
    assert "steps of 64: smaller differences are lost; subtract 1000000000 from it" in notices[0]


def test_a_parquet_file_of_arrows_columns_is_read_as_any_other(tmp_path):
    pytest.importorskip("pyarrow")
    frame = rows(day=pd.date_range("2020-01-01", periods=N)).convert_dtypes(dtype_backend="pyarrow")
    frame.loc[3, "age"] = pd.NA
    frame.to_parquet(tmp_path / "table.parquet")
    got = read_table(tmp_path / "table.parquet")
    assert not [kind for kind in got.dtypes if isinstance(kind, pd.ArrowDtype)]
    assert got["day"].iloc[0] == pd.Timestamp("2020-01-01")
    assert np.isnan(got["age"].iloc[3])


@pytest.mark.parametrize(
    ("written", "separator", "number"),
    [
        ("1,234.5", ",", 1234.5),
        ("1,234", ",", 1234.0),
        ("1.234,5", ";", 1234.5),
        ("1,234", ";", 1.234),
        ("12,5", ",", 12.5),
        ("1.234", ",", 1.234),
        ("-1,5e3", "\t", -1500.0),
    ],
)
def test_marks_of_decimals_and_thousands(tmp_path, written, separator, number):
    file = tmp_path / "table.csv"
    file.write_text(f'a{separator}b\n"{written}"{separator}x\nNA{separator}y\n')
    assert read_table(file)["a"].tolist()[:1] == [number]


def test_thousands_are_seen_where_another_number_shows_which_mark_is_which(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("people;share\n1.234;0,5\n999;0,25\n")
    assert read_table(file)["people"].tolist() == [1234, 999]


TEXTS = [f"P{i}" for i in range(N)]
REFUSED = {
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "header only": ("age,price\n", "has a header, but no rows"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00", r"is no text \(byte 6 is 26\); give a .csv or a .parquet file"),
    "twice": ("age,age,price\n1,2,3\n", "its header names 'age' more than once"),
    "no names": ("1,2\n3,4\n", "its first line holds numbers, no names"),
    "Excel's mark": ("sep=;\r\n" + csv(sep=";"), "its first line is Excel's 'sep=;', no names; remove that line"),
    "ragged": (csv() + "1,2,Bern,4,5\n", "a row has 5 fields, but its header has 4 .*'1,2,Bern,4,5'"),
    "a separator at each end but the header's": (
        "age,price\n" + "1,2,\n" * 30,
        "a row has 3 fields, but its header has 2 .separated by ','.: '1,2,'",
    ),
    "few": (rows().head(10), "10 rows have a target, but 20 is the least"),
    "no target": (rows().drop(columns="price").assign(prize=1), r"no column 'price' \(the target\); did you mean"),
    "one class": (rows(price="yes"), "is 'yes' in every row: there is nothing to tell apart"),
    "a rare class": (rows(price=["a"] + ["b", "c"] * 29 + ["b"]), "3 classes, and 1 of them less than 3 rows .'a': 1."),
    "classes or amounts": (rows(price=[1, 2, 3] * 20), r"\(1, 2, 3\): set task: multiclass if .* task: regression if"),
    "no classes": (rows(price=TEXTS), "60 different values in 60 rows .* these are no classes"),
    "mixed": (
        rows(age=["abc", *range(N - 1)]),
        r"'age' holds numbers, but also text in 1 rows \('abc' in row 1\); correct it, or add it to categorical; or "
        r'leave it out, drop: \["age"\]$',
    ),
    "several": (
        rows(age=["abc", *range(N - 1)], height=[np.inf, *range(N - 1)], price=[1, 2, 3] * 20),
        r"set task: multiclass if .*'height' holds infinity.*'age' holds numbers.*drop: \[\"height\", \"age\"\]$",
    ),
    "dates of two kinds": (
        rows(day=[f"2020-01-{i % 28 + 1:02}" if i < 40 else f"{i % 28 + 1}.3.2021" for i in range(N)]),
        r"'day' holds dates, written as 2020-01-31, but not in 20 of 60 rows \(the first: '13.3.2021' in row 41\)",
    ),
    "a target of dates": (
        rows(price=[f"2020-01-{i % 28 + 1:02}" for i in range(N)]),
        "target 'price' holds dates .'2020-01-01'.; predict a number that you make of them",
    ),
    "one row": (rows().head(1), "1 rows have a target, but 20 is the least"),
    "nothing but an identifier": (
        rows().assign(nr=range(N))[["nr", "price"]],
        r"no column to predict 'price' from; left out: 'nr': it counts the rows; .* keep: \[\"nr\"\]$",
    ),
    "the target dropped": (rows(), "drop names the target 'price'", {"drop": ["price"]}),
    "missing": (
        rows(age=[np.nan] * 5 + [1, 2] * 27 + [3]),
        "values are missing: 5 in 'age'; .* set missing: impute",
        {"missing": "error"},
    ),
    "target missing": (
        rows(price=[np.nan, *range(N - 1)]),
        r"missing in 1 of 60 rows \(the first: row 1\)",
        {"missing": "error"},
    ),
    "infinite": (rows(age=[np.inf, *range(N - 1)]), r"'age' holds infinity, .* in 1 of 60 rows \(the first: row 1\)"),
    "infinite target": (rows(price=[np.inf, *np.linspace(0, 1, N - 1)]), "'price' holds infinity"),
    "a target too large": (
        rows(price=rows().price * 1e300),
        "'price' holds infinity, or more than 3e38; .* a larger unit",
    ),
    "a target that float32 rounds": (
        rows(price=rows().price + 1e10),
        r"'price' varies by 22 around 1e\+10, but predictions are float32, .* steps of 1e\+03; subtract 1e\+10 from it",
    ),
    "nothing else": (rows()[["price"]], "no column to predict 'price' from; it is the only one"),
    "nothing but constants": (rows(a=1)[["a", "price"]], "from; left out: 'a': it has one value only$"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_learned_from_is_refused_in_one_line(make, case):
    content, why, *options = case
    message = refused(make, content, **(options[0] if options else {}))
    assert re.search(why, message), message


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": "prise"}, "no column 'prise' (the target); did you mean \"price\"?"),
        ({"drop": ["citi"]}, "no column 'citi' (in drop); did you mean \"city\"?"),
        ({"categorical": ["agee"]}, "no column 'agee' (in categorical); did you mean \"age\"?"),
        ({"task": "binary"}, "must have two values for task: binary, but it has"),
        (
            {"task": "regression", "target": "city"},
            "must be numbers for task: regression, but it holds 'Ba",
        ),
        ({"valid": 0.5, "test": 0.5}, "valid and test must be shares above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, options, why):
    assert why in refused(make, rows(), **options)


def test_folders_missing_files_and_broken_ones_are_refused(make, tmp_path):
    assert "is a folder" in refused(make, None, ".")
    assert "there is no such file" in refused(make, None, "none.csv")
    assert "cannot be read (BadGzipFile" in refused(make, b"hello", "table.csv.gz")
    assert "cannot be read (ArrowInvalid" in refused(make, b"hello", "table.parquet")
    pd.DataFrame({"list": [[1]] * N, "price": range(N)}).to_parquet(tmp_path / "lists.parquet")
    assert "'list' holds lists or structures" in refused(make, None, "lists.parquet")
    rows(day=pd.Timestamp("2020-01-01")).assign(day=lambda f: f.day + pd.to_timedelta(f.age, "D")).to_parquet(
        tmp_path / "days.parquet"
    )
    assert make(None, "days.parquet").table.columns[-1]["kind"] == "date"
    rows(spent=pd.to_timedelta(rows().age, "h")).to_parquet(tmp_path / "times.parquet")
    assert "'spent' holds times ('" in refused(make, None, "times.parquet")


def test_a_file_that_memory_has_no_room_for_is_refused_before_it_is_read(make, monkeypatch):
    monkeypatch.setattr(table_files, "free_bytes", lambda device: 5000)
    message = refused(make, rows())
    assert "need about 0.0 GB of memory, but 0.0 GB are free; keep fewer of its rows or columns" in message


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(30, 60))])
def test_whatever_is_in_a_file_there_is_a_table_or_one_line(make, seed):
    draw = random.Random(seed)
    values = ["1", "2.5", "1,5", "1.234,5", "", "NA", "?", "abc", " x ", "2020-01-02", "True", "inf", '"', "$5", "∞"]
    n, separator = draw.choice([1, 25, 60]), draw.choice(",;\t|")
    columns = [draw.choices(draw.sample(values, draw.randint(1, 4)), k=n) for _ in range(3)]
    columns.append([f"{draw.gauss(0, 1):.3f}" for _ in range(n)])
    lines = [("a", "b", "c", "d"), *zip(*columns, strict=True)]
    text = "\n".join(separator.join(line) for line in lines)
    options = {"target": draw.choice("abcd"), "missing": draw.choice(["error", "impute"])}
    try:
        objective = make(text, **options)
    except DataError:
        refused(make, text, **options)
        return
    split = objective.data().test.through(objective.preprocess(objective.data().train))
    assert all(torch.isfinite(x.double()).all() for x in split.inputs.values())


FIRST = {"regression": "r2", "binary": "auroc", "multiclass": "accuracy"}


@pytest.mark.parametrize(
    ("target", "task", "classes"),
    [
        (np.linspace(0, 1, N), "regression", ()),
        (np.arange(N), "regression", ()),
        (["no", "yes"] * 30, "binary", ("no", "yes")),
        ([0, 1] * 30, "binary", ("0", "1")),
        ([True, False] * 30, "binary", ("False", "True")),
        ([1.0, 2.0] * 30, "binary", ("1", "2")),
        (["a", "b", "c"] * 20, "multiclass", ("a", "b", "c")),
    ],
)
def test_the_task_is_told_from_the_target(make, target, task, classes):
    objective = make(rows(price=target))
    assert objective.table.task == task
    assert objective.info.class_names == classes
    assert next(iter(objective.metrics())) == FIRST[task]


def test_classes_that_are_numbers_are_in_their_order(make):
    objective = make(rows(price=[10, 9, 2] * 20), task="multiclass")
    assert objective.info.class_names == ("2", "9", "10")
    assert objective.info.class_counts == (12, 12, 12)


def test_splits_have_their_share_of_each_class_and_no_row_twice():
    classes = np.array([0] * 100 + [1] * 10 + [2] * 3)
    train, valid, test = rows_of_splits(classes, test=0.2, valid=0.1, seed=3)
    assert [np.bincount(classes[part]).tolist() for part in (train, valid, test)] == [
        [70, 7, 1],
        [10, 1, 1],
        [20, 2, 1],
    ]
    assert sorted(np.concatenate([train, valid, test])) == list(range(113))
    assert (rows_of_splits(classes, test=0.2, valid=0.1, seed=3)[0] == train).all()
    assert (rows_of_splits(classes, test=0.2, valid=0.1, seed=4)[0] != train).any()


def test_a_table_is_encoded_by_what_is_said_of_the_columns():
    columns = [
        {"name": "age", "kind": "number"},
        {"name": "city", "kind": "category", "categories": ["Basel", "Bern"]},
        {"name": "zip", "kind": "category", "categories": ["3000", "4000"]},
    ]
    frame = pd.DataFrame({"zip": [3000.0, np.nan, 1], "age": [1, None, 2.5], "city": ["Bern ", "Rom", None], "more": 1})
    tensors = encode(frame, json.loads(json.dumps(columns)))
    torch.testing.assert_close(tensors["numeric"], torch.tensor([[1], [torch.nan], [2.5]]), equal_nan=True)
    assert tensors["categorical"].tolist() == [[2, 1], [0, 0], [0, 0]]
    assert list(encode(frame, columns[:1])) == ["numeric"]
    with pytest.raises(DataError, match="the table: there is no column 'city'"):
        encode(frame.drop(columns="city"), columns)
    with pytest.raises(DataError, match="the table: column 'age' must be numbers, but got 'old' in row 2"):
        encode(frame.assign(age=["1", "old", "2"]), columns)


def predictor(objective, **params):
    torch.manual_seed(0)
    network = objective.build({**objective.defaults, **params}, objective.info).eval()
    preprocess, head = objective.preprocess(objective.data().train), objective.head()

    def predict(*inputs):
        prepared = preprocess(*inputs)
        outputs = network(*prepared) if isinstance(prepared, tuple) else network(prepared)
        return head(outputs if isinstance(outputs, torch.Tensor) else outputs[0])

    return predict


def test_missing_numbers_are_the_median_and_unknown_categories_are_one(make):
    age = [np.nan if i % 7 == 0 else i for i in range(N)]
    objective = make(rows(age=age, city=[None, "Bern", "Basel"] * 20), missing="impute")
    train = objective.data().train
    predict = predictor(objective)
    numbers, codes = torch.tensor([[30.0, 1.7]]).repeat(4, 1), torch.tensor([[0], [-1], [3], [999]])
    assert len(predict(numbers, codes).unique()) == 1
    numbers[0, 0], numbers[1, 0] = torch.nan, train.inputs["numeric"][:, 0].nanmedian()
    first, second, *_ = predict(numbers, torch.ones(4, 1, dtype=torch.long))
    assert first == second
    assert torch.isfinite(first)


def test_numbers_beyond_all_training_rows_lie_where_the_outermost_of_them_does(make):
    objective = make(rows())
    train = objective.data().train
    heights = train.inputs["numeric"][:, 1]
    lowest, highest = heights.min(), heights.max()
    numbers = torch.tensor([[30.0, lowest], [30.0, lowest - 1], [30.0, highest], [30.0, 1e9]])
    prepared = objective.preprocess(train)(numbers, torch.ones(4, 1, dtype=torch.long))[0][:, 1]
    outermost = torch.special.ndtri(torch.tensor(1 - 0.5 / len(train)))
    torch.testing.assert_close(prepared, outermost * torch.tensor([-1.0, -1.0, 1.0, 1.0]))


@pytest.mark.parametrize(("n_rows", "n_bins", "d_embedding"), [(60, 8, 8), (400, 12, 8), (2000, 48, 16)])
def test_few_rows_have_fewer_bins_a_narrower_embedding_and_a_long_patience(make, n_rows, n_bins, d_embedding):
    ages = np.random.RandomState(0).normal(40, 9, n_rows)
    objective = make(pd.DataFrame({"age": ages, "price": ages * 2}))
    defaults = objective.defaults
    assert (defaults["n_bins"], defaults["d_embedding"], defaults["batch_size"]) == (n_bins, d_embedding, 32)
    assert objective.pace == {"epochs": 60, "patience": 30, "ensemble": 5}


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_regression_is_the_same_in_any_unit(make, unit):
    plain, scaled = make(rows()), make(rows(price=rows().price * unit - 3 * unit), name="scaled.csv")
    torch.testing.assert_close(plain.data().train.targets, scaled.data().train.targets, rtol=1e-4, atol=1e-4)
    test = scaled.data().test
    got = scaled.head()(test.targets) / unit + 3
    torch.testing.assert_close(got, plain.head()(plain.data().test.targets), rtol=1e-4, atol=1e-3)
    values = [objective.metrics()["rmse"](torch.zeros(5, 1), torch.full((5, 1), 2.0)) for objective in (plain, scaled)]
    assert values[1] / unit == pytest.approx(values[0].item(), rel=1e-4)


@pytest.mark.parametrize("target", [np.linspace(0, 1, N), ["no", "yes"] * 30, ["a", "b", "c"] * 20])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ensemble", [0, 3])
@pytest.mark.parametrize("embedding", ["none", "piecewise", "periodic"])
def test_every_network_learns(make, target, batch_norm, ensemble, embedding):
    objective = make(rows(price=target), embedding=embedding)
    params = {**objective.defaults, "batch_norm": batch_norm, "ensemble": ensemble, "dropout": 0.0}
    torch.manual_seed(0)
    network = objective.build(params, objective.info)
    train = objective.data().train.through(objective.preprocess(objective.data().train))
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.01), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(objective.loss(network(*train.inputs.values()), train.targets, params))
        losses[-1].backward()
        optimizer.step()
    assert all(weight.grad is not None for weight in network.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_a_strange_table_becomes_a_model_that_predicts_another_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = rows(age=[np.nan if i % 9 == 0 else i for i in range(N)])
    frame.to_csv("strange.csv", sep=";", decimal=",", encoding="cp1252")
    options = "options: {file: strange.csv, target: price, missing: impute}"
    Path("strange.yaml").write_text(f"objective: tabular\n{options}\ntrials: 2\nepochs: 3\ntracking: off\n")
    done = run_hpo("run", "strange.yaml")
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "mlruns/bundles/strange"
    said = json.loads((bundle / "bundle.json").read_text())["about_the_data"]
    assert said["task"] == "regression"
    assert said["dropped"] == {"Unnamed: 0": "it has no name and counts the rows"}
    other = rows().head(5).assign(city=["Bern", "Rom", None, "Basel", "Zürich"])
    tensors = encode(other, said["columns"])
    predictions = torch.jit.load(bundle / "model.torchscript.pt")(**tensors)
    assert predictions.shape == (5, 1)
    assert ((predictions > 100) & (predictions < 400)).all()


def test_a_fault_of_the_table_is_one_line_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text("objective: tabular\noptions: {file: none.csv, target: price}\ntracking: off\n")
    done = run_hpo("check", "study.yaml")
    assert done.returncode == 2
    assert done.stderr.strip() == "hpo: none.csv: there is no such file"
