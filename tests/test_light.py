"""TorchMetrics is imported without torchvision and SciPy's signal processing, and all of it works nevertheless."""

import subprocess
import sys

import pytest

USES = """
import sys
import hpo.light
from torchmetrics.detection import IntersectionOverUnion
import torch
assert not loaded(), loaded()
arniqa = sys.modules["torchmetrics.functional.image.arniqa"]
assert arniqa.transforms.Resize((3, 3))(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 3, 3)
assert "torchvision" in loaded()
import torchvision.ops, torchvision.transforms, scipy.signal
assert type(torchvision).__name__ == type(scipy.signal).__name__ == "module"
boxes = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "labels": torch.tensor([0])}
half = {"boxes": torch.tensor([[0.0, 0, 2, 1]]), "labels": torch.tensor([0])}
metric = IntersectionOverUnion()
metric.update([boxes], [half])
assert float(metric.compute()["iou"]) == 0.5
"""
FIRST = """
import torchmetrics, sys
before = sys.modules["torchmetrics"]
import hpo.light
assert sys.modules["torchmetrics"] is before
assert "torchvision" in loaded()
"""
WHILE = """
import sys, types
import torch
source = open(SPEC.origin).read().replace("\\n_import()\\n", "\\n")
light = types.ModuleType("light")
exec(compile(source.partition("\\nfrom torchmetrics import")[0], "light", "exec"), light.__dict__)
with light._stand_ins():
    import torchvision
    assert "_StandIn" in type(torchvision).__name__
    assert callable(torchvision.ops.box_iou) and "_Later" not in type(torchvision.ops.box_iou).__name__
    import torchvision as real
    assert type(real).__name__ == "module"
"""


@pytest.mark.parametrize("code", [USES, FIRST, WHILE], ids=["uses", "first", "while"])
def test_what_is_not_used_is_not_imported_and_what_is_used_is_real(code):
    start = (
        "import sys\n"
        "from importlib.util import find_spec\n"
        "SPEC = find_spec('hpo.light')\n"
        "def loaded(): return {name for name in ('torchvision', 'scipy.signal') if name in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_version_that_needs_more_of_them_is_imported_as_it_is(tmp_path):
    package = tmp_path / "torchmetrics"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from torchvision.models import ResNet\nclass Network(ResNet): pass\nclass Metric: pass\n"
        "from torchvision.datasets import MNIST\n"
    )
    (package / "classification.py").write_text("class BinaryAccuracy: pass\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from hpo.light import Metric; import torchmetrics\n"
    code += "from torchvision.models import ResNet\nassert issubclass(torchmetrics.Network, ResNet)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_engine_imports_neither():
    code = "import sys, hpo.cli.commands; print([m for m in ('torchvision', 'scipy.signal') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
