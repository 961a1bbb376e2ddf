"""Libraries are imported without what they hardly use, and all of them work nevertheless."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

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
with light.lightly("torchmetrics"):
    import torchvision
    assert "_StandIn" in type(torchvision).__name__
    assert callable(torchvision.ops.box_iou) and "_Later" not in type(torchvision.ops.box_iou).__name__
    import torchvision as real
    assert type(real).__name__ == "module"
"""


SKLEARN = """
from hpo.light import lightly
with lightly("sklearn"):
    import numpy as np
    import sklearn.datasets, sklearn.metrics, sklearn.isotonic
    import scipy.stats.qmc
    from scipy.stats import norm
    import numpy.f2py
assert norm.cdf(0) == 0.5 and numpy.f2py.get_include()
assert sklearn.metrics.label_ranking_average_precision_score([[0, 1]], [[0.2, 0.9]]) == 1.0
assert type(sys.modules["scipy.stats"]).__name__ == type(sys.modules["numpy.f2py"]).__name__ == "module"
"""
PLOT = """
import hpo.light, torch, torchmetrics
from torchmetrics.classification import BinaryROC
assert "matplotlib" not in sys.modules
metric = BinaryROC()
metric.update(torch.tensor([0.1, 0.8]), torch.tensor([0, 1]))
metric.plot()
assert "matplotlib" in sys.modules
assert torchmetrics.utilities.plot.plot_curve.__module__ == "torchmetrics.utilities.plot"
"""
CHECK = """
import hpo, hpo.cli.commands
assert not loaded(), loaded()
hpo.check(STUDY)
lazy = {"torch._dynamo", "scipy.stats", "numpy.f2py", "matplotlib", "networkx"}
assert not lazy & set(sys.modules), lazy & set(sys.modules)
"""
COMPILER = """
from hpo.training import optim
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = optim.make({"optimizer": "adam", "learning_rate": 0.1}, [weight])
function = torch.optim.Optimizer.zero_grad.__wrapped__
weight.grad = torch.ones(2)
optim.step(optimizer)
assert abs(weight[0].item() - 0.9) < 1e-6
optimizer.zero_grad()
assert weight.grad is None and "torch._dynamo" not in sys.modules
import torch._dynamo
weight.grad = torch.ones(2)
optimizer.zero_grad()
assert weight.grad is None and type(vars(function)["__dynamo_disable"]).__name__ == "function"
"""
"""The four of them that one process tries, in an order in which none has imported what the next asks for."""


@pytest.mark.parametrize(
    "code",
    [CHECK + PLOT + COMPILER + USES, *(pytest.param(code, marks=pytest.mark.slow) for code in (FIRST, WHILE)), SKLEARN],
    ids=["check, plot, compiler, uses", "first", "while", "sklearn"],
)
def test_what_is_not_used_is_not_imported_and_what_is_used_is_real(code):
    start = (
        "import sys\n"
        "from importlib.util import find_spec\n"
        "SPEC = find_spec('hpo.light')\n"
        f"STUDY = {str(ROOT / 'studies/breast_cancer.yaml')!r}\n"
        "def loaded(): return {name for name in ('torchvision', 'scipy.signal') if name in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
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
