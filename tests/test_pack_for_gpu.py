"""`benchmarks/pack_for_gpu.py`: the data that travels to a GPU's machine, and how much may."""

import gzip
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
try:
    import pack_for_gpu
finally:
    sys.path.remove(str(ROOT / "benchmarks"))  # its modules' names are everyday ones

NAMES = [*pack_for_gpu.DATA, *(str(pack_for_gpu.RAW / name) for name in pack_for_gpu.IMAGES)]


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `data`, of which each file holds its own name; the command packs it into `to`."""
    for name in NAMES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    command = ["pack_for_gpu.py", "--to", str(tmp_path / "to"), "--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", command)
    return tmp_path


def test_the_data_sets_are_packed_images_gzipped(packing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_for_gpu.main()
    there = packing / "to/.data"
    found = {str(file.relative_to(there)): file.read_bytes() for file in there.rglob("*") if file.is_file()}
    plain = {name: name.encode() for name in pack_for_gpu.DATA}
    images = [str(pack_for_gpu.RAW / name) for name in pack_for_gpu.IMAGES]
    assert found.keys() == {*plain, *(f"{name}.gz" for name in images)}
    assert {name: found[name] for name in plain} == plain
    assert [gzip.decompress(found[f"{name}.gz"]).decode() for name in images] == images
    said = capsys.readouterr().out
    assert f"gunzip -kf .data/{pack_for_gpu.RAW}/*.gz" in said
    pack_for_gpu.main()
    assert all((there / name).read_bytes() == content for name, content in found.items())  # the same bytes again


@pytest.mark.parametrize("large", ["the checkout", ".data", ".whl"])
def test_more_than_60_mib_in_all_is_an_error(packing: Path, monkeypatch: pytest.MonkeyPatch, large: str) -> None:
    own = packing / "own"
    own.write_text("x")
    monkeypatch.setattr(pack_for_gpu, "own_files", lambda: [own])
    pack_for_gpu.main()
    file = own if large == "the checkout" else packing / "to" / large / "large"
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as sparse:
        sparse.truncate(60 * 2**20 + 1)
    with pytest.raises(SystemExit, match=r"^more than 60 MiB$"):
        pack_for_gpu.main()


def test_data_that_is_missing_is_named(packing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packing / "data" / NAMES[0]).unlink()
    with pytest.raises(SystemExit, match="2"):
        pack_for_gpu.main()
    assert f"there is no {packing / 'data' / NAMES[0]}; give --data" in capsys.readouterr().err
