"""A raw table just runs: what is found in it, what is said of it, and that a new table is taken the same way."""

import datetime
import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hpo.objectives.tables import TableOptions, encode, table_of

import hpo
from hpo.errors import DataError, InputError
from hpo.export.columns import Columns, Notes
from hpo.study.loading import load
from hpo.study.table_amounts import amounts, unit_of
from hpo.study.table_dates import dates_of, format_of, moments, numbers_of, written
from tests.conftest import run_hpo

N = 120


def passengers() -> pd.DataFrame:
    """A table as Titanic's is: an identifier, names, tickets, a cabin that is mostly missing, ages that are in part."""
    random = np.random.default_rng(0)
    sex = random.choice(["male", "female"], N)
    day = pd.Timestamp("1912-04-01") + pd.to_timedelta(np.arange(N) * 7 % 90, "D")
    return pd.DataFrame(
        {
            "PassengerId": np.arange(1, N + 1),
            "Survived": np.where(random.random(N) < 0.1, None, (sex == "female").astype(int).astype(object)),
            "Name": [f"Smith{i}, Mr. No. {i}" for i in range(N)],
            "Sex": sex,
            "Age": np.where(random.random(N) < 0.2, np.nan, random.integers(1, 80, N)),
            "Ticket": [f"A/{i}" for i in range(N)],
            "Cabin": [f"C{i}" if i % 4 == 0 else None for i in range(N)],
            "Embarked": random.choice(["S", "C", None], N),
            "day": np.where(np.arange(N) == 5, "soon", day.strftime("%d.%m.%Y")),
            "ship": "Titanic",
        }
    )


def tabular(frame: pd.DataFrame, folder: Path, **options):
    """Return the objective of a table that is written to `folder`."""
    frame.to_csv(folder / "raw.csv", index=False)
    objective, faults = load("tabular", {"file": str(folder / "raw.csv"), "target": "Survived"} | options, Path())
    assert not faults
    objective.info = objective.data().checked("tabular").info
    return objective


def test_each_column_is_what_it_is_meant_to_be(tmp_path):
    table = tabular(passengers(), tmp_path).table
    assert {c["name"]: c["kind"] for c in table.columns} == {
        "Sex": "category",
        "Age": "number",
        "Embarked": "category",
        "day": "date",
    }
    assert table.task == "binary"
    assert set(table.dropped) == {"PassengerId", "Name", "Ticket", "Cabin", "ship"}
    said = "\n".join(table.data.notices)
    for part in (
        f"{table.n_without_target} of {N} rows have no target and are left out",
        "'PassengerId': it counts the rows",
        "'Name': it is free text",
        "'Ticket': it is an identifier",
        "'ship': it has one value only",
        'keep: ["PassengerId"]',
        "column 'day' holds dates (%d.%m.%Y), taken as month, weekday, days",
        "column 'day': no date as %d.%m.%Y in 1 of",
        "in 'Age'",
        "missing: error refuses them",
    ):
        assert part in said


WITHOUT_HPO = "import sys; sys.modules |= dict.fromkeys(['hpo', 'pandas', 'numpy.f2py']); exec(sys.stdin.read())"


def test_the_card_says_how_a_row_becomes_tensors_with_torch_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "day": [f"{1 + i % 28}.{1 + i % 12}.{2018 + i % 4} {i % 24}:{i * 7 % 60:02}" for i in range(N)],
            "stored": [f"{9999 if i % 9 == 0 else 2020}-0{1 + i % 9}-11T10:15:30+02:00" for i in range(N)],
            "city": random.choice(["Bern", "Zug", "Basel"], N),
            "x": random.normal(size=N).round(3),
            "y": random.normal(size=N),
        }
    )
    frame.to_csv("raw.csv", index=False)
    study = hpo.run(
        {"objective": "tabular", "options": {"file": "raw.csv", "target": "y"}},
        name="card", trials=1, epochs=1, tracking="off", baseline=False, quiet=True,
    )  # fmt: skip
    bundle = hpo.load_bundle(study.bundle)
    assert [column["kind"] for column in bundle.about["columns"]] == ["number", "date", "date", "category"]
    text = (study.bundle / "MODEL.md").read_text()
    (code,) = (part.partition("```")[0] for part in text.split("```python")[1:] if "torch.jit.load" in part)
    assert "the hour, 0 to 23, and minutes / 60" in text
    rows = [bundle.about["example"], *(frame.iloc[i].drop("y").to_dict() for i in (0, 1, 50))]
    rows += [rows[1] | {"city": "Genf", "x": None}, rows[1] | {"city": None, "day": None, "stored": None}]
    more = f"for row in {rows[1:]!r}:\n    print(torch.jit.load('FOLDER/model.torchscript.pt')(*tensors(row)))"
    lines = f"{code}\n{more}".replace("FOLDER", str(study.bundle))
    done = subprocess.run([sys.executable, "-c", WITHOUT_HPO], input=lines, capture_output=True, text=True, check=False)
    numbers = [float(number) for number in re.findall(r"tensor\(\[\[(.*?)\]", done.stdout)]
    expected = bundle.predict(pd.DataFrame(rows))["prediction"]
    np.testing.assert_allclose(numbers, expected, atol=2e-4, err_msg=done.stderr)


def test_what_looks_like_an_identifier_may_be_kept(tmp_path):
    table = tabular(passengers(), tmp_path, keep=["PassengerId", "Ticket"]).table
    assert {"PassengerId", "Ticket"} <= {c["name"] for c in table.columns}


@pytest.mark.parametrize(
    ("name", "values", "kept"),
    [
        ("year", range(1900, 1900 + N), True),
        ("x", range(N), False),
        ("customer_id", [7 * (i * 37 % N) for i in range(N)], False),
        ("customer_id", [i % 10 for i in range(N)], True),
        ("paid", [i * 37 % N for i in range(N)], True),
        ("x", [i / 2 for i in range(N)], True),
    ],
)
def test_numbers_that_differ_in_each_row_are_identifiers_only_where_they_count_or_name_the_rows(
    tmp_path, name, values, kept
):
    table = tabular(passengers().assign(**{name: list(values)}), tmp_path, missing="impute").table
    assert (name in table.dropped) is not kept


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (["2020-01-31", "2021-12-01"], "ISO8601"),
        (["2020-01-31T10:00:00Z", "2021-12-01T10:00:00+02:00"], "ISO8601"),
        (["1604-02-29 12:30", "9999-12-31", "1650-01-01"], "ISO8601"),
        (["31-Dec-9999", "01-Feb-2000"], "%d-%b-%Y"),
        (["31.1.2020", "1.12.2021"], "%d.%m.%Y"),
        (["31/01/2020", "01/02/2021"], "%d/%m/%Y"),
        (["01/31/2020", "02/01/2021"], "%m/%d/%Y"),
        (["31-Jan-99", "01-Feb-00"], "%d-%b-%y"),
        (["1/31/2020 10:30 PM", "2/1/2021 1:05 AM"], "%m/%d/%Y %I:%M %p"),
        (["Jan 2020", "Feb 2021"], "%b %Y"),
        (["May", "June"], None),
        (["12:30", "13:45"], None),
        (["1.2.3", "1.2.4"], None),
        (["A/5 21171", "PC 17599"], None),
    ],
)
def test_how_dates_are_written_is_seen(texts, form):
    values = pd.Series(texts, dtype="string")
    assert format_of(values) == form
    assert form is None or moments(values, form).notna().all()


def test_dates_of_all_years_are_the_same_however_they_are_stored(tmp_path):
    years = [(9999, 1, 1600, 2263)[i % 4] if i % 3 == 0 else 2020 for i in range(N)]
    stored = [f"{year:04}-{1 + i % 12:02}-{1 + i % 28:02}" for i, year in enumerate(years)]
    days = pd.Series(stored).astype("datetime64[s]")
    objects = pd.Series([datetime.date.fromisoformat(day) for day in stored], dtype=object)
    periods = pd.Series(pd.PeriodIndex(stored, freq="D"))
    other = [f"{day[8:]}.{day[5:7]}.{day[:4]}" for day in stored]
    numbers, columns = [], []
    for texts in (stored, other, days, objects, periods):
        frame = pd.DataFrame({"day": texts, "y": np.arange(N) / 3})
        file = tmp_path / ("raw.csv" if isinstance(texts, list) else "raw.parquet")
        frame.to_csv(file, index=False) if isinstance(texts, list) else frame.to_parquet(file)
        table = table_of(TableOptions(file=file, target="y"))
        (column,) = table.columns
        columns.append({name: value for name, value in column.items() if name != "format"})
        numbers.append(encode(frame, [column])["numeric"].numpy())
        about = {"inputs": [{"name": "numeric", "dtype": "float32", "shape": [None, 4]}], "missing": True}
        made = Columns(about, [column | {"input": "numeric"}]).arrays(frame, "new", 1, Notes())["numeric"]
        np.testing.assert_array_equal(made, numbers[-1])
        np.testing.assert_array_equal(numbers[-1], numbers[0])
        assert columns[-1] == columns[0]
        assert not any("count as missing" in line for line in table.data.notices)
    assert columns[0]["first"].startswith("0001")
    (year, weekday), parts = numbers[0][0, [0, 2]], columns[0]["parts"]
    assert (year, weekday, parts) == (9999, datetime.date(9999, 1, 1).weekday(), ["year", "month", "weekday", "days"])
    days_of = [float(x) for x in numbers[0][0]]
    assert written(days_of, columns[0] | {"format": "ISO8601"}) == stored[0]


@pytest.mark.parametrize(("end", "zone"), [("T10:00:00+02:00", ", in UTC"), ("T10:00Z", ", in UTC"), (" 10:00:00", "")])
def test_dates_with_a_time_zone_are_said_to_be_in_utc(tmp_path, end, zone):
    stored = [f"2020-{1 + i % 12:02}-{1 + i % 28:02}{end}" for i in range(N)]
    for day in (stored, pd.to_datetime(pd.Series(stored))):
        pd.DataFrame({"day": day, "y": np.arange(N) / 3}).to_parquet(tmp_path / "raw.parquet")
        table = table_of(TableOptions(file=tmp_path / "raw.parquet", target="y"))
        assert f"column 'day' holds dates (2020-01-31{zone}), taken as month, weekday, days" in table.data.notices


def test_a_bundle_of_an_earlier_version_reads_dates_as_it_did():
    column = {"format": "ISO8601", "first": "2020-01-01T00:00:00", "parts": ["year", "days"]}
    text, stored = pd.Series(["9999-12-31", "2020-01-02"]), pd.Series(["9999-12-31"]).astype("datetime64[s]")
    days = (datetime.date(9999, 12, 31) - datetime.date(2020, 1, 1)).days
    of_text, of_stored = numbers_of(dates_of(text, column), column), numbers_of(dates_of(stored, column), column)
    unit = pd.to_datetime(text, format="ISO8601", errors="coerce").dt.unit
    if unit == "ns":  # before pandas 3, as when it was trained
        np.testing.assert_array_equal(of_text, [[np.nan, np.nan], [2020, 1]])
        np.testing.assert_allclose(of_stored, [[9999, days - 14 * 2**64 / 86_400e9]])  # nanoseconds overflow
    else:
        assert of_text.tolist() == [[9999, days], [2020, 1]]
        assert of_stored.tolist() == [[9999, days]]
    new = column | {"any_year": True}
    assert numbers_of(dates_of(text, new), new).tolist() == [[9999, days], [2020, 1]]


@pytest.mark.parametrize("texts", [["9999-12-31T23:00:00-05:00"], ["0000-01-01"], ["9999-02-30"], ["31.12.99"]])
def test_what_is_no_date_of_any_year_is_none(texts):
    assert moments(pd.Series(texts), "ISO8601").isna().all()


@pytest.mark.parametrize(
    ("texts", "unit", "numbers"),
    [
        (["$1,200.50", "-$3", "$1,000,000"], "$", ["1200.50", "-3", "1000000"]),
        (["1.200,50 €", "3 €"], "€", ["1200.50", "3"]),
        (["1.200 €", "950 €"], "€", ["1200", "950"]),
        (["CHF 1'200.50", "CHF 7.-", "CHF 8"], "CHF", ["1200.50", "CHF 7.-", "8"]),
        (["45.125%", "7 %"], "%", ["45.125", "7"]),
        (["1,5%", "7%"], "%", ["1.5", "7"]),
        (["$5", "5 €"], None, None),
        (["A 5", "A/5", "5 kg"], None, None),
        (["5", "6", "$7"], None, None),
    ],
)
def test_numbers_with_a_unit_are_numbers(texts, unit, numbers):
    text = pd.Series(texts, dtype="string")
    of = unit_of(text)
    assert (of[0] if of else None) == unit
    assert of is None or amounts(text, of[1]).tolist() == numbers


def test_a_column_of_prices_is_one_of_numbers_and_so_it_is_in_a_new_table(tmp_path):
    prices = [f"${1000 + 7 * i:,}.50" for i in range(N)]
    table = tabular(passengers().assign(price=prices), tmp_path).table
    (column,) = [c for c in table.columns if c["name"] == "price"]
    assert column == {"name": "price", "kind": "number", "decimal": "."}
    assert "column 'price' holds numbers with '$': '$1,000.50' is 1000.50" in table.data.notices
    about = {"inputs": [{"name": "numeric", "dtype": "float32", "shape": [None, 1]}], "missing": True}
    columns = Columns(about, [column | {"input": "numeric"}])
    new = pd.DataFrame({"price": ["$1,200.50", "3", None]})
    made = columns.arrays(new, "new.csv", 1, Notes())["numeric"]
    np.testing.assert_array_equal(made, [[1200.5], [3], [np.nan]])
    np.testing.assert_array_equal(encode(new, [column])["numeric"].numpy(), made)
    with pytest.raises(InputError, match="row 1, column 'price': must be a finite number, but got '12 boxes'"):
        columns.arrays(pd.DataFrame({"price": ["12 boxes"]}), "new.csv", 1, Notes())


def test_prices_among_which_other_text_is_are_refused_with_what_to_do(tmp_path):
    prices = [f"${1000 + 7 * i:,}.50" for i in range(N - 1)] + ["free"]
    with pytest.raises(DataError, match=r"holds numbers with '\$', but also other text in 1 rows .'free' in row 120."):
        tabular(passengers().assign(price=prices, Survived=range(N)), tmp_path)


BARE = """
import json, sys
import pandas as pd, hpo
made = hpo.load_bundle(sys.argv[1]).predict(pd.read_csv(sys.argv[2]))
made.to_csv(sys.argv[3], index=False)
assert not any(name.startswith("hpo.objectives") for name in sys.modules)
"""


def test_a_new_table_is_taken_as_the_one_that_was_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    passengers().to_csv("raw.csv", index=False)
    Path("raw.yaml").write_text(
        "objective: tabular\noptions: {file: raw.csv, target: Survived}\ntrials: 2\nepochs: 3\ntracking: off\n"
        "params: {n_hidden: 16, ensemble: 0, batch_size: 32, learning_rate: {type: float, low: 0.001, high: 0.01}}\n"
    )
    checked = run_hpo("check", "raw.yaml")
    assert checked.returncode == 0, checked.stderr
    done = run_hpo("run", "raw.yaml")
    assert done.returncode == 0, done.stderr
    for output in (checked, done):
        assert "'PassengerId': it counts the rows" in " ".join((output.stdout + output.stderr).split())
    bundle = tmp_path / "mlruns/bundles/raw"
    about = json.loads((bundle / "bundle.json").read_text())
    assert about["about_the_data"]["notices"]
    assert "a date, as %d.%m.%Y" in (bundle / "MODEL.md").read_text()
    new = passengers().drop(columns=["Survived", "Name", "ship"]).iloc[:, ::-1].head(6).reset_index(drop=True)
    new.loc[0, "Embarked"], new.loc[1, "Age"], new.loc[2, "day"], new.loc[3, "day"] = "Q", np.nan, None, "some day"
    new.to_csv("new.csv", index=False)
    whole = run_hpo("predict", str(bundle), "new.csv")
    assert whole.returncode == 0, whole.stderr
    assert (
        "2 values are no dates as training had them, and taken as missing (the first: 'some day' in row 4)"
        in " ".join(whole.stderr.split())
    )
    by_command = pd.read_csv(StringIO(whole.stdout))
    by_frame = hpo.load_bundle(bundle).predict(new)
    subprocess.run([sys.executable, "-c", BARE, str(bundle), "new.csv", "bare.csv"], check=True)
    for made in (by_command, pd.read_csv("bare.csv")):
        assert made["class"].astype(str).tolist() == by_frame["class"].tolist()
        np.testing.assert_allclose(made["probability"], by_frame["probability"], atol=1e-6)
    dated = new.assign(day=pd.to_datetime(new.day, format="%d.%m.%Y", errors="coerce"))
    pd.testing.assert_frame_equal(hpo.load_bundle(bundle).predict(dated), by_frame)
    example = hpo.load_bundle(bundle).predict(pd.DataFrame([about["example"]]))
    assert len(example) == 1
