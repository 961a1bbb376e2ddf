"""The example notebook runs from its first cell to its last, in a kernel of its own, and is stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the notebook; return what each of its code cells has shown, as text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return [
        "".join(each.get("text", each.get("data", {}).get("text/plain", "")) for each in cell.outputs)
        for cell in book.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_notebook_runs(ran: list[str]) -> None:
    run, trials, curves, predicted, opened = ran
    assert "[8/8] trial " in run, "progress is shown"
    assert trials.count("COMPLETE") + trials.count("PRUNED") == 8
    assert "train_accuracy" in curves
    assert "valid_accuracy" in curves
    assert "accuracy" in predicted
    assert "tensor([" in predicted
    assert opened.startswith("Study('iris': 8 of 8 trials finished, best accuracy ")


def test_it_is_stored_without_outputs() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert [cell.outputs for cell in book.cells if cell.cell_type == "code"] == [[]] * 5
