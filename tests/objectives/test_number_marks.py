"""What a number of a table means follows from its whole column, not from the order of rows or the size of a file."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hpo.objectives.table_files import read_table
from hpo.objectives.tables import TableOptions, table_of

from hpo.errors import InputError
from hpo.export.columns import Columns, Notes
from hpo.export.reading import chunks
from hpo.study import table_groups
from hpo.study.table_groups import groups
from hpo.study.table_marks import number_pattern
from tests.objectives.test_written_numbers import about, german, written

MANY = 60_000
"""Rows of more bytes than the beginning of a file that is looked at for its separator."""


def values_of(file: Path, columns: dict[str, list[str]], separator: str, order: np.ndarray) -> pd.DataFrame:
    """Return what is read of columns in that order of rows, back in the order in which they are given."""
    frame = read_table(written(file, {n: [texts[i] for i in order] for n, texts in columns.items()}, separator))
    return frame.set_axis(order).sort_index()


def mixed() -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    random = np.random.default_rng(0)
    numbers = {
        "thousands": np.sort(random.integers(0, 2000, MANY)),
        "late": np.where(np.arange(MANY) > MANY - 9, 1.5, np.arange(MANY) % 90),
        "amount": random.uniform(1, 900, MANY).round(2),
    }
    texts = {
        "thousands": [german(x, 0) for x in numbers["thousands"]],
        "late": [german(x, 1) if x % 1 else f"{x:.0f}" for x in numbers["late"]],
        "amount": [german(x) for x in numbers["amount"]],
    }
    return numbers, texts


@pytest.mark.parametrize(
    ("separator", "columns"),
    [
        pytest.param(separator, columns, marks=() if columns in by_default else pytest.mark.slow)
        for separator, by_default in ((";", [["late"]]), (",", [["thousands", "late", "amount"]]))
        for columns in (["thousands"], ["late"], ["thousands", "late"], ["thousands", "late", "amount"])
    ],
)
def test_the_order_of_rows_says_nothing_of_what_numbers_are(tmp_path: Path, columns: list[str], separator: str) -> None:
    numbers, texts = mixed()
    taken = {name: texts[name] for name in columns} | {"n": [str(i % 50) for i in range(MANY)]}
    if separator == ",":
        swap = str.maketrans(",.", ".,")
        taken = {
            name: [f'"{x.translate(swap)}"' if "." in x else x.translate(swap) for x in v] for name, v in taken.items()
        }
    orders = [np.arange(MANY), np.arange(MANY)[::-1], np.random.default_rng(1).permutation(MANY)]
    for order in orders:
        frame = values_of(tmp_path / "t.csv", taken, separator, order)
        for name in columns:
            np.testing.assert_array_equal(frame[name], numbers[name])


def test_three_decimals_and_round_ones_are_no_thousands_in_any_order(tmp_path: Path) -> None:
    milli = np.sort(np.random.default_rng(0).integers(0, 99_999, MANY)) / 1000
    texts = {"milli": [f"{x:.3f}" for x in milli], "round": [f"{i % 7}.000" for i in range(MANY)]}
    for order in (np.arange(MANY), np.arange(MANY)[::-1]):
        frame = values_of(tmp_path / "t.csv", texts, ";", order)
        np.testing.assert_array_equal(frame["milli"], milli)
        np.testing.assert_array_equal(frame["round"], np.arange(MANY) % 7)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """What bundle.json says of a German table: `a` has decimals and `c` thousands, `e` has English decimals."""
    random = np.random.default_rng(0)
    a, c = random.uniform(10, 5000, 300), random.integers(10, 5000, 300)
    columns = {
        "a": [german(x) for x in a],
        "c": [german(x, 0) for x in c],
        "e": [f"{x / 7:.2f}" for x in c],
        "y": [german(x) for x in a + c],
    }
    file = written(tmp_path_factory.mktemp("t") / "t.csv", columns)
    return about(table_of(TableOptions(file=file, target="y")))


def read(trained: tuple[dict, list[dict]], path: Path, columns: dict[str, list[str]]) -> np.ndarray:
    facts, described = trained
    made = chunks(str(written(path, columns)), facts, Columns(facts, described), None, Notes())
    return np.concatenate([chunk.arrays["numeric"] for chunk in made])


@pytest.mark.parametrize("n", [0, 3, 70_000])
@pytest.mark.parametrize(
    ("others", "row", "number"),
    [
        (("500,25", "900", "0.5"), ("500,25", "1.500", "1.25"), (500.25, 1500, 1.25)),
        (("500", "900", "3"), ("500", "1.500", "1.250"), (500, 1500, 1.25)),
        (("500", "900", "3"), ("1.500", "900", "2"), (1500, 900, 2)),
        (("500", "900", "3"), ("1.500,25", "2", "2"), (1500.25, 2, 2)),
        (("500", "900", "3"), ("2", "1.500,25", "7.5"), (2, 1500.25, 7.5)),
    ],
)
def test_a_row_is_the_same_alone_and_behind_many(trained, tmp_path: Path, n: int, others, row, number) -> None:
    columns = {name: [other] * n + [last] for name, other, last in zip("ace", others, row, strict=True)}
    got = read(trained, tmp_path / "new.csv", columns)
    assert len(got) == n + 1
    np.testing.assert_array_equal(got[-1], np.float32(number))


@pytest.mark.parametrize("order", [1, -1])
def test_a_column_that_is_not_written_as_in_training_is_so_from_its_first_row(trained, tmp_path: Path, order) -> None:
    """English decimals, of which only the last two show that they are none of training's thousands."""
    c = [*["1.500"] * 70_000, "0.25", "1000"][::order]
    got = read(trained, tmp_path / "new.csv", {"a": ["1"] * len(c), "c": c, "e": ["1"] * len(c)})
    np.testing.assert_array_equal(got[::order][[0, -3, -2, -1], 1], [1.5, 1.5, 0.25, 1000])


def test_stdin_is_read_as_a_file(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a;c;e\n" + "500;900;3\n" * 70_000 + "1.500,5;1.500;1.5\n"

    class Pipe(io.BytesIO):
        def seek(self, *place: int) -> int:
            raise io.UnsupportedOperation("a pipe")

    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": Pipe(text.encode())}))
    facts, described = trained
    *_, last = chunks("-", facts, Columns(facts, described), None, Notes())
    np.testing.assert_array_equal(last.arrays["numeric"][-1], [1500.5, 1500, 1.5])


CODES = ["007", "7", "07", "12"]


def with_codes(path: Path, codes: list[str], n: int = 120, **more: list[str]) -> Path:
    columns = {"c": [codes[i % len(codes)] for i in range(n)], "x": [f"{i * i % 97 / 2}" for i in range(n)]}
    return written(path, columns | {"y": [f"{i * 7 % 31 / 3:.3f}" for i in range(n)]} | more, ",")


def codes_of(table, source: Path | pd.DataFrame, notes: Notes | None = None) -> list[int]:
    facts, columns = about(table)
    if isinstance(source, pd.DataFrame):
        return Columns(facts, columns).arrays(source, "here", 1, notes or Notes())["categorical"][:, 0].tolist()
    made = chunks(str(source), facts, Columns(facts, columns), None, notes or Notes())
    return [code for chunk in made for code in chunk.arrays["categorical"][:, 0].tolist()]


@pytest.mark.parametrize(
    ("codes", "named"),
    [(CODES, True), (CODES, False), (["01234", "04321", "00001"], False), (["1.1", "1.10", "2.5"], True)],
)
def test_codes_that_look_like_numbers_stay_as_they_are_written(tmp_path: Path, codes: list[str], named: bool) -> None:
    file = with_codes(tmp_path / "t.csv", codes)
    table = table_of(TableOptions(file=file, target="y", categorical=("c",) if named else ()))
    column = next(c for c in table.columns if c["name"] == "c")
    assert column["categories"] == sorted(codes)
    assert any("'c' holds whole numbers with leading zeros" in line for line in table.data.notices) is not named
    rows = [sorted(codes).index(code) + 1 for code in codes]
    (tmp_path / "new.csv").write_text("x,c\n" + "".join(f"1,{code}\n" for code in codes))
    assert codes_of(table, tmp_path / "new.csv") == rows
    assert codes_of(table, pd.DataFrame({"x": 1.0, "c": codes})) == rows


def test_codes_are_matched_as_texts_and_numbers_where_one_category_is_that(tmp_path: Path) -> None:
    table = table_of(TableOptions(file=with_codes(tmp_path / "t.csv", [*CODES, "08"]), target="y", categorical=("c",)))
    notes = Notes()
    (tmp_path / "new.csv").write_text("x,c\n1,0007\n1,7.0\n1,8\n1,012\n1,12\n")
    assert codes_of(table, tmp_path / "new.csv", notes) == [0, 5, 0, 0, 4]  # 007, 07, 08, 12, 7
    assert notes.unknown["c"] == (3, "'0007' in row 1")
    for numbers in ([7, 12, 8], [7.0, 12.0, 8.0]):
        assert codes_of(table, pd.DataFrame({"x": 1.0, "c": numbers})) == [5, 4, 3]
    pd.DataFrame({"x": 1.0, "c": [7, 12, 8, 9]}).to_parquet(tmp_path / "new.parquet")
    assert codes_of(table, tmp_path / "new.parquet") == [5, 4, 3, 0]


def test_a_model_of_an_earlier_version_knows_its_categories_as_before() -> None:
    facts = {"inputs": [{"name": "categorical", "dtype": "int64", "shape": [1, 1]}], "missing": True}
    column = {"name": "c", "kind": "category", "input": "categorical", "categories": ["12", "7"]}
    got = Columns(facts, [column]).arrays(pd.DataFrame({"c": ["007", "7", "7.0", "7,0"]}), "here", 1, Notes())
    assert got["categorical"][:, 0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "texts", [["05", "10", "12"], ["0012", "0345", "1234"], ["0", "10", "7"], ["0.5", "00.7", "1"]]
)
def test_numbers_of_which_some_have_leading_zeros_are_numbers(tmp_path: Path, texts: list[str]) -> None:
    table = table_of(TableOptions(file=with_codes(tmp_path / "t.csv", texts), target="y"))
    assert [c["kind"] for c in table.columns] == ["number", "number"]


def test_leading_zeros_are_seen_wherever_they_are(tmp_path: Path) -> None:
    """Behind the beginning of a file, in its last field, in quotes, where one is missing; in a column of Parquet."""
    many = [str(1 + i % 9) for i in range(MANY)]
    for last in ("07", '"07"', "07\n,"):
        text = "x,c\n" + "".join(f"1.5,{code}\n" for code in many) + f"1.5,{last}"
        (tmp_path / "t.csv").write_text(text)
        assert set(read_table(tmp_path / "t.csv")["c"].dropna()) == {*map(str, range(1, 10)), "07"}
    frame = pd.DataFrame({"c": CODES * 30, "x": np.arange(120) ** 2 % 97, "y": np.arange(120) * 7 % 31 / 3})
    frame.to_parquet(tmp_path / "t.parquet")
    table = table_of(TableOptions(file=tmp_path / "t.parquet", target="y"))
    assert table.columns[0]["categories"] == sorted(CODES)


@pytest.mark.parametrize(
    ("texts", "task", "names"),
    [
        (["01", "1"], "auto", ("01", "1")),
        (["010", "020"], "auto", ("010", "020")),
        (["9", "010", "10"], "multiclass", ("9", "010", "10")),
        (["1.1", "1.10"], "auto", ("1.1", "1.10")),
        (["2.1", "2.10", "10.5"], "multiclass", ("2.1", "2.10", "10.5")),
        (["0", "1", "1.0"], "auto", ("0", "1")),
        (["10", "9"], "auto", ("9", "10")),
        (['"1,5"', '"2,5"'], "auto", ("1,5", "2,5")),
    ],
)
def test_classes_are_called_as_they_are_written(tmp_path: Path, texts: list[str], task: str, names) -> None:
    targets = [texts[i % len(texts)] for i in range(120)]
    table = table_of(TableOptions(file=with_codes(tmp_path / "t.csv", ["a", "b"], y=targets), target="y", task=task))
    assert table.data.class_names == names
    assert table.task == ("binary" if len(names) == 2 else "multiclass")
    parts = (table.data.train, table.data.valid, table.data.test)
    counts = np.bincount(np.concatenate([part.targets.numpy().ravel().astype(int) for part in parts]))
    known = [text.strip('"').removesuffix(".0") for text in targets]
    assert counts.tolist() == [known.count(name) for name in names]


def test_amounts_with_leading_zeros_may_be_predicted(tmp_path: Path) -> None:
    file = with_codes(tmp_path / "t.csv", ["a", "b"], y=[f"{i:04}" for i in range(120)])
    assert table_of(TableOptions(file=file, target="y", task="regression")).mean > 1


@pytest.mark.parametrize("texts", [["true", "false"], ["TRUE", "FALSE"], ["True", None]])
def test_texts_of_truth_values_are_numbers_in_a_frame_as_in_a_file(tmp_path: Path, texts: list) -> None:
    table = table_of(TableOptions(file=with_codes(tmp_path / "t.csv", ["true", "false"]), target="y"))
    frame = pd.DataFrame({"c": texts, "x": 1.5})
    frame.to_csv(tmp_path / "new.csv", index=False)
    facts, columns = about(table)
    (chunk,) = chunks(str(tmp_path / "new.csv"), facts, Columns(facts, columns), None, Notes())
    for kind in (object, "string", "category"):
        got = Columns(facts, columns).arrays(frame.astype({"c": kind}), "here", 1, Notes())["numeric"]
        np.testing.assert_array_equal(got, chunk.arrays["numeric"])
        np.testing.assert_array_equal(got[:, 0], [1, np.nan if texts[1] is None else 0])
    with pytest.raises(InputError, match="column 'c': must be a finite number, but got 'true'"):
        Columns(facts, columns).arrays(pd.DataFrame({"c": ["1", "true"], "x": 1.5}), "here", 1, Notes())


GROUPED = """n.a;b;c;d;"e.x
y"
1.5;1.234,5;01.02.2020;"1.234.567";"a;1.234"

2;3;4;-1.234;0.123
;;;;1.234
"""


def test_where_marks_of_thousands_stand_is_seen_in_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1 << 18, 16, 40):
        monkeypatch.setattr(table_groups, "_BLOCK", block)
        assert groups(io.BytesIO(GROUPED.encode()), ";", ".") == ({0, 1, 2, 3, 4}, {0, 2, 4})
    assert groups(io.BytesIO(b"a;b\r1;2.000\r"), ";", ".") is None
    marks = number_pattern(",", ".")
    digits = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(digits.choice(list("0123456789...,"), size=digits.integers(2, 12)))
        if "." in text:
            bad = bool(groups(io.BytesIO(f"x;y\n1;{text}\n".encode()), ";", ".")[1])
            assert bad or marks.fullmatch(text) or text.count(",") > 1, text
            assert not (bad and marks.fullmatch(text)), text


def test_thousands_beside_dates_and_other_decimals_are_read_in_any_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    numbers = {"a": random.uniform(1000, 9000, MANY).round(2), "c": random.integers(1, 5000, MANY)}
    numbers |= {"e": np.sort(random.uniform(-9, 99_999, MANY).round(2)), "f": random.uniform(0, 9, MANY).round(1)}
    texts = {name: [german(x, 0 if name == "c" else 2) for x in numbers[name]] for name in "ace"}
    texts |= {"f": [str(x) for x in numbers["f"]], "day": [f"{1 + i % 28:02}.12.2020" for i in range(MANY)]}
    for order in (np.arange(MANY), np.arange(MANY)[::-1]):
        frame = values_of(tmp_path / "t.csv", texts, ";", order)
        for name, values in numbers.items():
            np.testing.assert_array_equal(frame[name], values)
        assert frame["day"].tolist() == texts["day"]
