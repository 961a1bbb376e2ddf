"""How numbers, missing values and names stand in a raw table that is learned from, or predicted."""

import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hpo.objectives.table_files import read_table
from hpo.objectives.tables import Table, TableOptions, encode, table_of

from hpo.errors import DataError, InputError
from hpo.export.columns import Columns, Notes
from hpo.export.predicting import predict
from hpo.export.reading import chunks
from hpo.export.texts import marks_in, read_as_in_a_file
from tests.cli import refused

N = 60
RANDOM = np.random.default_rng(0)


def german(x: float, digits: int = 2) -> str:
    return f"{x:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def written(path: Path, columns: dict[str, list[str]], separator: str = ";") -> Path:
    rows = [separator.join(row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([separator.join(columns), *rows]) + "\n")
    return path


def about(table: Table) -> tuple[dict, list[dict]]:
    """Return what bundle.json says of a table's inputs, as far as rows are read by it."""
    inputs = [
        {"name": n, "shape": [1, x.shape[1]], "dtype": str(x.dtype)[6:]} for n, x in table.data.train.inputs.items()
    ]
    places = {"category": "categorical"}
    columns = [dict(c) | {"input": places.get(c["kind"], "numeric")} for c in table.columns]
    return {"inputs": inputs, "missing": True, "class_names": []}, columns


def read(table: Table, file: Path, notes: Notes | None = None, keep: str | None = None) -> dict[str, np.ndarray]:
    facts, columns = about(table)
    (chunk,) = chunks(str(file), facts, Columns(facts, columns), keep, notes or Notes())
    return dict(chunk.arrays) | dict(chunk.kept)


@pytest.fixture
def amounts() -> np.ndarray:
    return RANDOM.uniform(100, 20000, N).round(2)


def test_another_files_numbers_are_those_of_training_however_few_marks_they_have(
    tmp_path: Path, amounts: np.ndarray
) -> None:
    columns = {
        "n": [f"{i % 7}" for i in range(N)],
        "z": [german(x) for x in amounts],
        "y": [german(x / 7) for x in amounts],
    }
    table = table_of(TableOptions(file=written(tmp_path / "de.csv", columns), target="y"))
    assert [column.get("marks") for column in table.columns] == [[",", "."]] * 2
    assert any("'z'" in line and "',' for decimals and '.' for thousands" in line for line in table.data.notices)
    forms = (("1.234", "9.000"), ("1.234,00", "9.000,00"), ("1234", "9000"), ("1234.0", "9000.00"))
    for form in forms:
        file = written(tmp_path / "new.csv", {"n": ["1", "2"], "z": list(form)})
        np.testing.assert_array_equal(read(table, file)["numeric"], [[1, 1234], [2, 9000]])
        assert read(table, file, keep="z")["z"] == list(form)


def test_numbers_of_which_the_large_ones_have_a_mark_are_thousands(tmp_path: Path) -> None:
    values = [99, 845, 1234, 12345, 7, 23456] * 10
    for separator, mark in ((";", "."), (";", ","), ("\t", ","), ("|", "."), (",", ",")):
        texts = [f"{x:,}".replace(",", mark) for x in values]
        texts = [f'"{text}"' for text in texts] if separator == "," else texts
        frame = read_table(written(tmp_path / "t.csv", {"x": texts, "y": ["1"] * len(values)}, separator))
        assert frame["x"].tolist() == values


def test_numbers_with_three_decimals_stay_what_they_are(tmp_path: Path) -> None:
    for texts in (["1.125", "2.375", "3", "5"], ["1.234", "12.5", "845", "912"], ["1.234", "5.678", "9.123", "2.345"]):
        frame = read_table(written(tmp_path / "t.csv", {"x": texts * 5, "y": ["1"] * 20}, ","))
        assert frame["x"].tolist() == [float(text) for text in texts] * 5


def test_each_column_has_its_own_marks_and_what_is_no_number_stays_text(tmp_path: Path, amounts: np.ndarray) -> None:
    columns = {
        "a": [german(x) for x in amounts],
        "b": [german(x * 3) for x in amounts],
        "latitude": [f"{40 + i / 7:.4f}" for i in range(N)],
        "ip": ["192.168.0.1", "10.0.0.7"] * (N // 2),
        "day": [f"{1 + i % 28:02}.12.2020" for i in range(N)],
    }
    frame = read_table(written(tmp_path / "t.csv", columns))
    np.testing.assert_allclose(frame["a"], amounts)
    np.testing.assert_allclose(frame["latitude"], [float(x) for x in columns["latitude"]])
    assert frame["ip"].tolist() == columns["ip"]
    assert frame["day"].tolist() == columns["day"]


def test_words_for_missing_values_that_are_categories_of_the_model_stay_those(tmp_path: Path) -> None:
    groups = ["NA", "None", "?", "v", "w"] * (N // 5)
    frame = pd.DataFrame({"g": groups, "x": np.arange(N) % 11 * 1.5, "y": np.arange(N) * 0.5})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = table_of(TableOptions(file=tmp_path / "t.parquet", target="y"))
    notes = Notes()
    arrays = read(table, tmp_path / "t.csv", notes)
    np.testing.assert_array_equal(arrays["categorical"], encode(frame, table.columns)["categorical"].numpy())
    (tmp_path / "u.csv").write_text("g,x\nNULL,1.5\nv,NA\n")
    arrays = read(table, tmp_path / "u.csv", notes)
    assert arrays["categorical"][0] == 0
    assert np.isnan(arrays["numeric"]).tolist() == [[False], [True]]
    assert not notes.unknown


def test_words_that_take_a_target_away_are_said(tmp_path: Path) -> None:
    texts = ["None", "Mild", "Severe"] * (N // 3)
    table = table_of(
        TableOptions(file=written(tmp_path / "t.csv", {"x": [f"{i * i}" for i in range(N)], "y": texts}), target="y")
    )
    assert any(f"{N // 3} say 'None', which is read as missing" in line for line in table.data.notices)


def test_classes_that_differ_by_blanks_are_one(tmp_path: Path) -> None:
    x = [f"{i * i}" for i in range(N)]
    one = written(tmp_path / "one.csv", {"x": x, "y": ["yes", "yes "] * (N // 2)})
    with pytest.raises(DataError, match="'yes' in every row"):
        table_of(TableOptions(file=one, target="y"))
    two = written(tmp_path / "two.csv", {"x": x, "y": ["yes", "yes ", "no"] * (N // 3)})
    assert table_of(TableOptions(file=two, target="y")).task == "binary"


def test_a_column_twice_dates_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "t.csv", {"x": [f"{i * i}" for i in range(N)], "y": [f"{i / 3}" for i in range(N)]})
    facts, columns = about(table_of(TableOptions(file=file, target="y")))
    several = Columns(facts, columns)
    with pytest.raises(InputError, match="several columns named 'x'"):
        several.required("the table", ["x", "z", "x"], None, Notes())
    for values in (pd.to_datetime(["2020-01-01"]), pd.to_timedelta(["1h"]), np.array([1j])):
        with pytest.raises(InputError, match="column 'x' must be numbers, but is"):
            several.arrays(pd.DataFrame({"x": values}), "the table", 1, Notes())
    with pytest.raises(InputError, match="must be a finite number"):
        several.arrays(pd.DataFrame({"x": [10**400]}, dtype=object), "the table", 1, Notes())


def test_dates_are_what_they_are_however_the_column_was_written(tmp_path: Path) -> None:
    days = pd.date_range("2020-01-01", periods=N)
    file = written(tmp_path / "t.csv", {"d": [f"{d:%d.%m.%Y}" for d in days], "y": [f"{i / 3}" for i in range(N)]})
    table = table_of(TableOptions(file=file, target="y"))
    facts, columns = about(table)
    texts = pd.DataFrame({"d": [f"{d:%d.%m.%Y}" for d in days[:3]]})
    objects = pd.DataFrame({"d": [datetime.date(2020, 1, i) for i in (1, 2, 3)]})
    one, two = (Columns(facts, columns).arrays(f, "the table", 1, Notes())["numeric"] for f in (texts, objects))
    np.testing.assert_array_equal(one, two)


def test_named_rows_of_a_parquet_file_are_a_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"city": ["Bern", "Basel"] * 20, "x": range(40), "y": np.arange(40) / 3})
    frame.set_index("city").to_parquet(tmp_path / "T.PARQUET")
    assert sorted(read_table(tmp_path / "T.PARQUET")) == ["city", "x", "y"]


def test_what_yaml_reads_otherwise_is_said_with_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "t.csv", {"x": ["1"], "y": ["2"]})
    (tmp_path / "s.yaml").write_text("objective: tabular\noptions: {file: t.csv, target: 2020, drop: x, keep: [7]}\n")
    said = refused("check", "s.yaml")
    assert 'options.target: must be a text, but got the number 2020; write "2020", with the quotes' in said
    assert "options.drop: must be a list, but got 'x'; write [x]" in said
    assert "options.keep[0]: must be a text, but got the number 7" in said


def test_a_split_of_one_row_and_a_seed_that_numpy_does_not_take_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "t.csv", {"x": [f"{i * i}" for i in range(N)], "y": [f"{i / 3}" for i in range(N)]})
    with pytest.raises(DataError, match="of 60 rows is one row"):
        table_of(TableOptions(file=file, target="y", valid=0.001))
    with pytest.raises(ValueError, match="seed must be from 0"):
        TableOptions(file=file, target="y", seed=-1)


@pytest.mark.parametrize("kind", ["object", "string", "category", "parquet"])
def test_texts_of_a_frame_and_of_parquet_are_read_as_those_of_a_file(tmp_path: Path, kind: str) -> None:
    columns = {
        "x": [german(2000 + 37 * i, 0) for i in range(N)],
        "z": [f"{i}" for i in range(N, 0, -1)],
        "y": [german(i * 3.7) for i in range(N)],
    }
    table = table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="y", keep=("z",)))
    facts, said = about(table)
    facts |= {"output": {"values": "numbers", "shape": [None]}}

    def predicted(frame: pd.DataFrame) -> np.ndarray:
        if kind == "parquet":
            frame.to_parquet(tmp_path / "new.parquet")
            source = chunks(str(tmp_path / "new.parquet"), facts, Columns(facts, said), None, Notes())
            return np.concatenate([chunk.arrays["numeric"] for chunk in source])
        seen: list[torch.Tensor] = []
        predict(lambda x: seen.append(x) or x[:, 0], facts | {"columns": said}, frame.astype(kind), None)
        return seen[0].numpy()

    for x, z in (
        (["7.064", "8"], ["1.234", ""]),
        (["7064", "8"], ["1234.0", "NA"]),
        (["7.064,00", "8"], ["1234", " "]),
    ):
        new = written(tmp_path / "new.csv", {"x": x, "z": z})
        got = predicted(pd.DataFrame({"x": x, "z": z}))
        np.testing.assert_array_equal(got, [[7064, 1234], [8, np.nan]])
        np.testing.assert_array_equal(got, read(table, new)["numeric"])
    for column in said:
        column.pop("marks")
    np.testing.assert_array_equal(predicted(pd.DataFrame({"x": ["7.064"], "z": ["1,5"]})), [np.float32([7.064, 1.5])])
    with pytest.raises(InputError, match="column 'z': must be a finite number, but got '1,234'"):
        predicted(pd.DataFrame({"x": ["7.064"], "z": ["1,234"]}))


def test_a_column_without_a_name_that_is_called_as_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",Unnamed: 0,y\n" + "1.5,2,3\n" * N)
    with pytest.raises(
        DataError, match="its column 1 has no name and is called 'Unnamed: 0', as column 2 is; give each its own name"
    ):
        read_table(tmp_path / "t.csv")


def test_truth_values_are_not_said_to_have_marks(tmp_path: Path) -> None:
    columns = {
        "flag": ["True", "False"] * (N // 2),
        "x": [f"{i * i},5" for i in range(N)],
        "y": [f"{i},25" for i in range(N)],
    }
    table = table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="y"))
    assert "numbers in 'x', 'y' are read with ',' for decimals" in table.data.notices


def test_rows_that_a_quote_which_is_not_closed_makes_one_are_said(tmp_path: Path) -> None:
    columns = {
        "x": [f"{i * i}.5" for i in range(N)],
        "z": [f'"{i % 5} pipe' if i in (3, 4) else f"{i % 5} pipe" for i in range(N)],
        "note": ['"well; so\nso"' if i > 9 else "none" for i in range(N)],
        "y": [f"{i}.25" for i in range(N)],
    }
    table = table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="y"))
    (line,) = (line for line in table.data.notices if "line break" in line)
    assert "column 'z' holds line breaks and ';' in 1 rows (the first: row 4, '3 pipe;" in line
    columns["z"] = [text.strip('"') for text in columns["z"]]
    table = table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="y"))
    assert not any("line break" in line for line in table.data.notices)


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u202f"])
@pytest.mark.parametrize("digits", [0, 2])
def test_blanks_between_thousands_are_marks_where_nothing_else_is_in_the_column(
    tmp_path: Path, amounts: np.ndarray, blank: str, digits: int
) -> None:
    def french(x: float) -> str:
        return f"{x:,.{digits}f}".translate(str.maketrans(",.", f"{blank},"))

    notes = [f"{i % 9} 000" if i else "about 5 000" for i in range(N)]
    columns = {
        "x": [french(x) for x in amounts],
        "s": [f"{x:.1f}".replace(".", ",") for x in amounts / 1000],
        "note": notes,
        "y": [french(x * 3) for x in amounts],
    }
    file = written(tmp_path / "t.csv", columns)
    table = table_of(TableOptions(file=file, target="y"))
    kinds = {column["name"]: (column["kind"], column.get("marks")) for column in table.columns}
    assert [kinds[name][0] for name in ("x", "s", "note")] == ["number", "number", "category"]
    assert kinds["x"][1][1] == " "
    assert table.mean == pytest.approx(3 * amounts.mean(), rel=0.2)
    numbers = np.float32(np.stack([amounts.round(digits), (amounts / 1000).round(1)], 1))
    np.testing.assert_array_equal(read(table, file)["numeric"], numbers)
    facts, said = about(table)
    frame = pd.DataFrame({"x": columns["x"], "s": columns["s"], "note": notes})
    plain = pd.DataFrame({"x": amounts.round(digits), "s": (amounts / 1000).round(1), "note": notes})
    for each in (frame, frame.iloc[:1], plain, plain.astype(str)):
        new = Columns(facts, said)
        got = new.arrays(read_as_in_a_file(each, marks_in([each], new)), "here", 1, Notes())["numeric"]
        np.testing.assert_array_equal(got, numbers[: len(each)])
    plain.to_csv(tmp_path / "new.csv", index=False)
    np.testing.assert_array_equal(read(table, tmp_path / "new.csv")["numeric"], numbers)


@pytest.mark.parametrize("rest", ["7", "7.5"])
def test_a_number_larger_than_any_is_infinity(tmp_path: Path, rest: str) -> None:
    x, y = [f"{i * i}" for i in range(N)], [f"{i / 3}" for i in range(N)]
    columns = {"x": [*x[1:-1], "1e400", rest], "y": y}
    with pytest.raises(
        DataError, match=r"column .x. holds infinity, or more than 3e38, in 1 of 60 rows .the first: row 59"
    ):
        table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="y"))
    with pytest.raises(DataError, match="the target 'x' holds infinity"):
        table_of(TableOptions(file=written(tmp_path / "t.csv", columns), target="x", task="regression"))
