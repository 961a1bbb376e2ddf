"""How fast `hpo predict` is on 1,000,000 rows, beside a bare torch loop over the same chunks, and in how much memory.

    python -m benchmarks.predict [--rows 1000000]

A California housing model (8 numbers, MLP 8-64-64-1) predicts a CSV of the given number of rows, drawn from the data's
own. `bare` parses the same chunks by the same pandas call, and for each: a tensor, the model, the predictions as CSV.
Each is a process of its own; its imports are not counted. That memory is constant, a tenth of the rows shows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import fetch_california_housing

from hpo.export.bundle import export
from hpo.export.model import Model
from hpo.study.blocks import MLP, Standardize
from hpo.study.data import DataInfo, Split, data_home

_BARE = """
import csv, sys, pandas as pd, torch, warnings
warnings.simplefilter("ignore")
folder, file, out = sys.argv[1:]
model = torch.jit.load(folder + "/model.torchscript.pt")
names = {names!r}
with open(out, "w", newline="") as stream, torch.inference_mode():
    writer = csv.writer(stream)
    writer.writerow(["prediction"])
    for frame in pd.read_csv(file, chunksize=65536, low_memory=False):
        x = torch.from_numpy(frame[names].to_numpy("float32"))
        y = torch.cat([model(part) for part in x.split(8192)])
        writer.writerows([f"{{v:.7g}}"] for v in y[:, 0].tolist())
"""
_SAID = """
import csv, sys, time, torch, pandas, pathlib, hpo.cli.predict, hpo.export.predicting, hpo.export.loading
start = time.perf_counter()
{run}
seconds = time.perf_counter() - start
memory = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(seconds, memory, file=sys.stderr)
"""


def _bundle(folder: Path) -> list[str]:
    bunch = fetch_california_housing(data_home=str(data_home() / "sklearn"), download_if_missing=False)
    x, names = torch.from_numpy(bunch.data).float(), tuple(map(str, bunch.feature_names))
    info = DataInfo(inputs={"features": (8,)}, input_dtypes={"features": "float32"}, feature_names=names)
    model = Model(
        preprocess=Standardize(x),
        network=MLP(8, [64, 64], 1),
        head=torch.nn.Identity(),
        params={},
        info=info,
        about={"study": "california"},
    )
    export(model, Split(inputs={"features": x[:2000]}, targets=torch.zeros(2000)), folder)
    return list(names)


def _table(file: Path, rows: int) -> None:
    bunch = fetch_california_housing(data_home=str(data_home() / "sklearn"), download_if_missing=False)
    frame = pd.DataFrame(bunch.data, columns=bunch.feature_names).round(4)
    text = frame.to_csv(index=False, header=False)
    with file.open("w") as stream:
        stream.write(",".join(frame.columns) + "\n")
        for _ in range(rows // len(frame)):
            stream.write(text)
        stream.writelines(line + "\n" for line in text.splitlines()[: rows % len(frame)])


def _measured(code: str, *arguments: object) -> tuple[float, float]:
    """Return the seconds without imports, and the largest memory in MiB, of a process that runs `code`."""
    command = [sys.executable, "-c", _SAID.format(run=code.strip()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    seconds, memory = done.stderr.split()[-2:]
    return float(seconds), float(memory)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    rows, repeats = parser.parse_args().rows, parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as work:
        folder, large, small = Path(work, "bundle"), Path(work, "large.csv"), Path(work, "small.csv")
        names = _bundle(folder)
        _table(large, rows)
        _table(small, rows // 10)
        predict = (
            "folder, file, out = sys.argv[1:]\n"
            "hpo.cli.predict.predict(pathlib.Path(folder), file, 'csv', pathlib.Path(out), None, None)"
        )
        runs = {
            f"bare torch loop, {rows:,} rows": (_BARE.format(names=names), folder, large, Path(work, "bare.csv")),
            f"hpo predict, {rows:,} rows": (predict, folder, large, Path(work, "ours.csv")),
            f"hpo predict, {rows // 10:,} rows": (predict, folder, small, Path(work, "few.csv")),
        }
        rounds = [{name: _measured(*run) for name, run in runs.items()} for _ in range(repeats)]
        found = {name: min(each[name] for each in rounds) for name in runs}
        same = Path(work, "bare.csv").read_text().split() == Path(work, "ours.csv").read_text().split()
    print(f"torch {torch.__version__}, best of {repeats}; the same predictions: {same}\n")
    print("| | seconds | rows a second | MiB |\n|---|---|---|---|")
    for name, (seconds, memory) in found.items():
        n = rows // 10 if name.endswith(f"{rows // 10:,} rows") else rows
        print(f"| {name} | {seconds:.2f} | {n / seconds:,.0f} | {memory:.0f} |")
    bare, ours, _ = (seconds for seconds, _ in found.values())
    print(f"\nhpo predict has {bare / ours:.0%} of the bare loop's speed")


if __name__ == "__main__":
    main()
