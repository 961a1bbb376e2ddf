"""What `gpu.py` needs on a machine that reaches nothing, put where it travels with the checkout.

    python benchmarks/pack_for_gpu.py [--to FOLDER] [--wheels] [--data FOLDER]

FOLDER (default: this checkout) gets `.data`: California, Fashion-MNIST (its four files gzipped), Covertype, from
`--data`, else HPO_DATA_HOME; and with `--wheels` `.whl`: those packages, for Python 3.12, that a machine with torch,
torchvision, torchmetrics and scikit-learn does not have. Both are ignored by git. The exit status is 1 above 60 MiB in
all: more may not travel. What to run there is printed last.
"""

import argparse
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_items import ROOT

MOST = 60 * 2**20
"""Bytes that may travel, the checkout's own files among them."""
DATA = ("sklearn/cal_housing_py3.pkz", "sklearn/covertype/samples_py3", "sklearn/covertype/targets_py3")
RAW = Path("torchvision/FashionMNIST/raw")
IMAGES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PACKAGES = ("optuna", "sqlalchemy", "alembic", "mako", "colorlog", "cmaes", "psycopg", "psycopg-binary")
"""What hpo needs, and a machine with torch may lack, without what these need in turn: that is there."""
WHOLE = "pydantic"
"""What comes with all that it needs: its core in the one version that it is made for, and small packages of types."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
COMMANDS = """
In the checkout's root, with `.whl` and `.data` beside its files, $OUT a folder, each part a call of its own:

    export PYTHONPATH=/tmp/site:$PWD HPO_DATA_HOME=$PWD/.data PYTHONUNBUFFERED=1
    python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site --find-links .whl .whl/*.whl
    gunzip -kf .data/{raw}/*.gz
    python3 benchmarks/gpu.py --part check --seconds 240 --out $OUT
    python3 benchmarks/gpu.py --part training --seconds 480 --out $OUT
    python3 benchmarks/gpu.py --part study --seconds 480 --out $OUT
"""


def pack_data(source: Path, folder: Path) -> None:
    """Copy the data sets; gzip always gives the same bytes for the same file."""
    for name in DATA:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    (folder / RAW).mkdir(parents=True, exist_ok=True)
    for name in IMAGES:
        content = (source / RAW / name).read_bytes()
        (folder / RAW / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))


def pack_wheels(folder: Path) -> None:
    """Download the wheels into an empty folder: two versions of a package could not be installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    download = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--python-version", "3.12"]
    download += ["--implementation", "cp", "--dest", str(folder)]
    download += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run([*download, WHOLE], check=True)
    subprocess.run([*download, "--no-deps", *PACKAGES], check=True)


def bytes_in(paths: list[Path]) -> int:
    """Return how many bytes files, and all files in folders, have."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def own_files() -> list[Path]:
    """Return the checkout's files that travel: all that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT, metavar="FOLDER")
    parser.add_argument("--wheels", action="store_true", help="download the wheels too")
    parser.add_argument("--data", type=Path, help="where the data is (default: HPO_DATA_HOME)")
    given = parser.parse_args()
    source = given.data or Path(os.environ.get("HPO_DATA_HOME", ""))
    missing = [
        str(source / name) for name in (*DATA, *(RAW / name for name in IMAGES)) if not (source / name).is_file()
    ]
    if missing:
        parser.error(f"there is no {', no '.join(missing)}; give --data, or HPO_DATA_HOME")
    pack_data(source, given.to / ".data")
    if given.wheels:
        pack_wheels(given.to / ".whl")
    sizes = {
        "the checkout": bytes_in(own_files()),
        ".data": bytes_in([given.to / ".data"]),
        ".whl": bytes_in([given.to / ".whl"]),
    }
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        print(f"{name:14} {size / 2**20:6.1f} MiB")
    print(COMMANDS.format(raw=RAW))
    if sum(sizes.values()) > MOST:
        sys.exit(f"more than {MOST / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
