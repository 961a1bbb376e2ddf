"""Bundles: written whole or not at all, usable with torch alone, and proved equal to what was measured."""

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hpo.objectives.models import QuantileNormal, ScalePixels
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hpo
from hpo.errors import ExportError, InputError
from hpo.export import parity
from hpo.export.apart import apart
from hpo.export.bundle import export, require_place
from hpo.export.formats import ALWAYS, FILE_OF, formats_of
from hpo.export.model import Model
from hpo.export.onnx_file import ndtri, searchsorted
from hpo.export.parity import BATCH_SIZES, TOLERANCE, parity_of
from hpo.study.blocks import MLP, Standardize
from hpo.study.data import DataInfo, Split
from tests import warm

PARAMS = {"optimizer": "adam", "learning_rate": 0.01, "n_hidden": 8}
ABOUT = {"study": "s", "objective": "o", "trial": 3, "metrics": {"test_r2": 0.5}, "data_fingerprint": "0123"}


@pytest.fixture
def started(monkeypatch):
    """Have the process that loads a bundle be one of its own, as it is outside of tests, no fork of a warm one."""
    monkeypatch.setattr(parity, "subprocess", subprocess)


class Branchy(nn.Module):
    """Takes one of two ways, which tracing would freeze to the example's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        if bool((x.sum() > 0).item()):
            return self.linear(x)
        return -self.linear(x)


class Shifted(nn.Linear):
    """Is another model once it is scripted."""

    def forward(self, x):
        if torch.jit.is_scripting():
            return nn.functional.linear(x, self.weight, self.bias) + 0.01
        return nn.functional.linear(x, self.weight, self.bias)


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, left, right):
        return self.linear(left) + right


class Twice(nn.Module):
    """A preprocessing of two inputs."""

    def forward(self, left, right):
        return left * 2, right * 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def held_out(*shapes, n=130):
    names = ("features", "other")
    return Split(
        inputs={name: torch.randn(n, *shape) for name, shape in zip(names, shapes, strict=False)},
        targets=torch.zeros(n),
    )


def model(network, rows, preprocess=None, head=None):
    info = DataInfo(
        inputs={name: tuple(x.shape[1:]) for name, x in rows.inputs.items()},
        input_dtypes={name: str(x.dtype).removeprefix("torch.") for name, x in rows.inputs.items()},
        feature_names=("a", "b"),
        class_names=("no", "yes"),
    )
    return Model(
        preprocess=preprocess or nn.Identity(),
        network=network,
        head=head or nn.Identity(),
        params=PARAMS,
        info=info,
        about=ABOUT,
    )


def tabular(rows):
    return model(MLP(4, [8], 2), rows, Standardize(rows.inputs["features"]), nn.Softmax(dim=-1))


def wide(rows):
    return model(MLP(4, [2000], 2), rows)


def predictions(module, rows):
    with torch.no_grad():
        return module(*rows.inputs.values())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "bundles" / "s"


FRESH = """
import json, sys
import torch
folder = sys.argv[1]
saved = torch.load(folder + "/model.pt", weights_only=True)
script = torch.jit.load(folder + "/model.torchscript.pt")
inputs, expected = torch.load(folder + "/../expected.pt", weights_only=True)
with torch.no_grad():
    difference = (script(inputs) - expected).abs().max().item()
assert not {"hpo"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"difference": difference, "keys": sorted(saved["model_state_dict"]),
                  "hyperparameters": saved["model_hyperparameters"], "trial": saved["trial"]}))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_alone_loads_it_and_predicts_the_same(folder):
    rows = held_out((4,))
    made = tabular(rows)
    export(made, rows, folder)
    torch.save((rows.inputs["features"], predictions(made.predictor(), rows)), folder.parent / "expected.pt")
    done = subprocess.run([sys.executable, "-I", "-c", FRESH, str(folder)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["difference"] <= TOLERANCE
    assert seen["keys"] == sorted(
        [
            "preprocess.mean",
            "preprocess.std",
            "network.layers.hidden1.weight",
            "network.layers.hidden1.bias",
            "network.layers.output.weight",
            "network.layers.output.bias",
        ]
    )
    assert seen["hyperparameters"] == PARAMS | {"input_shapes": {"features": [4]}, "n_classes": 2}
    assert seen["trial"] == 3


def test_bundle_json_says_what_it_is(folder):
    rows = held_out((4,))
    about = export(tabular(rows), rows, folder)
    assert json.loads((folder / "bundle.json").read_text()) == json.loads(json.dumps(about))
    assert about["params"] == PARAMS
    assert about.items() >= ABOUT.items()
    assert about["inputs"] == [{"name": "features", "shape": [None, 4], "dtype": "float32"}]
    assert about["output"] == {"name": "prediction", "shape": [None, 2], "dtype": "float32", "values": "probabilities"}
    assert list(about["class_names"]) == ["no", "yes"]
    assert about["n_parameters"] == 4 * 8 + 8 + 8 * 2 + 2
    assert about["versions"]["torch"] == version("torch")
    assert about["torchscript"]["compiled"] == "script"
    for result in about["parity"].values():
        assert result["max_difference"] <= TOLERANCE
        assert result["batch_sizes"] == list(BATCH_SIZES)
        assert result["rows"] == 130


def test_the_exported_model_is_not_the_one_that_goes_on(folder):
    rows = held_out((4,))
    made = tabular(rows)
    made.network.train()
    before = made.network.state_dict()["layers.output.bias"].clone()
    export(made, rows, folder)
    assert made.network.training
    assert all(p.requires_grad for p in made.network.parameters())
    assert torch.equal(made.network.state_dict()["layers.output.bias"], before)


def test_dropout_and_batch_norm_are_exported_in_evaluation_mode(folder):
    rows = held_out((4,))
    made = model(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train(), rows)
    export(made, rows, folder)
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    torch.testing.assert_close(predictions(loaded, rows), predictions(made.predictor(), rows), atol=TOLERANCE, rtol=0)


def test_a_convolutional_network_has_parity_whatever_the_optimiser_does(folder):
    pixels = Split(inputs={"pixels": torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8)}, targets=torch.zeros(70))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    made = model(network, pixels, ScalePixels())
    about = export(made, pixels, folder)
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    expected = predictions(made.predictor(), pixels)
    torch.testing.assert_close(predictions(loaded, pixels), expected, atol=TOLERANCE, rtol=0)
    assert about["inputs"][0]["dtype"] == "uint8"
    assert about["torchscript"]["optimized_for_inference"] is False
    assert about["torchscript"]["not_optimized"]


class PreNorm(nn.Module):
    """A residual block whose BatchNorm is not the only reader of the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x)).relu()


def test_a_batch_norm_that_is_not_the_only_reader_of_a_layer_is_not_folded_into_it(folder):
    """As torch.jit.freeze does, whose model then gives other predictions."""
    rows = held_out((6,))
    network = nn.Sequential(nn.Linear(6, 8), PreNorm(), nn.Linear(8, 3))
    for _ in range(20):
        network(torch.randn(16, 6) + 1)
    made = model(network, rows)
    about = export(made, rows, folder)
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    torch.testing.assert_close(predictions(loaded, rows), predictions(made.predictor(), rows), atol=TOLERANCE, rtol=0)
    assert about["torchscript"]["optimized_for_inference"] is True
    assert about["torchscript"]["not_optimized"].startswith("its predictions differ by ")


class OfFewRows(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 8:
            raise ValueError("too many rows")
        return super().forward(x)


def test_a_network_that_takes_no_large_batch_is_said_to_give_no_predictions(folder):
    rows = held_out((4,))
    with pytest.raises(ExportError, match=r"the model gives no predictions for a batch of \d+ \(too many rows\)"):
        export(model(OfFewRows(4, 2), rows), rows, folder)


@pytest.mark.parametrize("preprocess", [None, Twice()])
def test_several_named_inputs(folder, preprocess):
    rows = held_out((3,), (2,))
    made = model(Sum(), rows, preprocess, nn.Sigmoid())
    about = export(made, rows, folder)
    assert [entry["name"] for entry in about["inputs"]] == ["features", "other"]
    assert about["torchscript"]["compiled"] == "trace"
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    left, right = rows.inputs.values()
    prepared = (left, right) if preprocess is None else (left * 2, right * 3)
    with torch.no_grad():
        expected = (made.network.linear(prepared[0]) + prepared[1]).sigmoid()
    torch.testing.assert_close(predictions(loaded, rows), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(loaded(other=right, features=left), expected, atol=TOLERANCE, rtol=0)


def test_what_torchscript_cannot_hold_is_said_as_that_and_so_is_a_batch_that_is_refused(folder):
    rows = held_out((4,))
    with pytest.raises(ExportError, match=r"cannot be exported .Could not export Python function call 'Sign'"):
        export(model(Binary(), rows), rows, folder)
    alone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    with pytest.raises(ExportError, match=r"gives no predictions for a batch of 1 .Expected more than 1 value"):
        export(model(alone, rows), rows, folder)
    assert not folder.exists()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return Sign.apply(self.linear(x))


def test_what_is_scripted_but_cannot_be_run_is_traced(folder):
    """A parametrized weight is compiled to nothing but an error."""
    rows = held_out((4,))
    made = model(nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)), rows)
    about = export(made, rows, folder)["torchscript"]
    assert about["compiled"] == "trace"
    assert "Parametrization" in about["not_scripted"]
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    torch.testing.assert_close(predictions(loaded, rows), predictions(made.predictor(), rows), atol=TOLERANCE, rtol=0)


class Centred(nn.Module):
    """What it gives of a row depends on the other rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        y = self.linear(x)
        return y - y.mean(0)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


def batch_norm(tracked):
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1, track_running_stats=tracked), nn.Flatten())


@pytest.mark.parametrize(
    ("network", "depends"),
    [(Centred(), True), (batch_norm(False), True), (batch_norm(True), False), (MLP(4, [64, 64], 2), False)],
)
def test_predictions_that_depend_on_the_rows_given_with_them_are_noted(folder, said, network, depends):
    rows = held_out((4,))
    about = export(model(network, rows), rows, folder)
    assert [
        each.startswith("predictions of a row depend on which rows are given with it: ") for each in about["notes"]
    ] == ([True] if depends else [])
    assert said == [f"s: {each}" for each in about["notes"]]
    assert ("- Note that predictions of a row depend" in (folder / "MODEL.md").read_text()) == depends


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_rounding_noise_and_a_single_row_are_no_dependence(scale):
    x = torch.randn(64, 4)
    assert apart(lambda x: scale * MLP(4, [8], 2).eval().requires_grad_(False)(x), [x[:1]]) == 0
    network, centred = MLP(4, [256, 256], 2).eval(), Centred()
    assert apart(lambda x: scale * network(x), [x]) == 0
    assert apart(lambda x: scale * centred(x), [x]) > 0.01 * scale
    assert apart(Noisy(4, 2), [x]) == 0  # which row it is of, cannot be seen
    with pytest.raises(ValueError, match=r"of one row its predictions have the shape \(\), not \(1,\)"):
        apart(lambda x: x.sum(1).squeeze(), [x])


def test_both_ways_of_a_branch_are_exported(folder):
    rows = held_out((4,))
    made = model(Branchy(), rows)
    assert export(made, rows, folder)["torchscript"]["compiled"] == "script"
    loaded = torch.jit.load(folder / "model.torchscript.pt")
    for x in (torch.full((2, 4), 3.0), torch.full((2, 4), -3.0)):
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), made.network(x), atol=TOLERANCE, rtol=0)


@pytest.fixture
def existing(folder):
    """Return what a good bundle in `folder` holds."""
    rows = held_out((4,))
    export(tabular(rows), rows, folder)
    (folder / "notes.txt").write_text("mine")
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_differs_from_the_measured_model_is_refused_and_nothing_changes(folder, existing):
    rows = held_out((4,))
    message = (
        r"^model.torchscript.pt is not the model that was measured: its predictions differ by up to 0.01 "
        r"\(allowed: [0-9.]+e-05\); nothing was exported$"
    )
    with pytest.raises(ExportError, match=message):
        export(model(Shifted(4, 2), rows), rows, folder)
    assert contents(folder) == existing
    assert [path.name for path in folder.parent.iterdir()] == ["s"]


def test_nan_is_no_parity(folder):
    rows = held_out((4,))
    with pytest.raises(ExportError, match=r"differ by up to inf \(allowed: [0-9.]+e-05\); nothing was exported"):
        export(model(Logarithm(), rows), rows, folder)
    assert list(folder.parent.iterdir()) == []


def test_one_nan_among_many_rows_is_no_parity():
    rows = held_out((4,))
    rows.inputs["features"].abs_()
    rows.inputs["features"][5, 1] = -1.0
    assert parity_of(Logarithm(), Logarithm(), rows)["max_difference"] == float("inf")


def test_a_bundle_is_replaced_whole(folder, existing):
    rows = held_out((4,))
    made = tabular(rows)
    export(made, rows, folder)
    assert {path.name for path in folder.iterdir()} == {"model.pt", "model.torchscript.pt", "bundle.json", "MODEL.md"}
    assert (folder / "model.pt").read_bytes() != existing["model.pt"]
    assert [path.name for path in folder.parent.iterdir()] == ["s"]
    before = os.umask(0o027)
    try:
        export(made, rows, folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750  # as any folder that is made then
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def everything(folder):
    return sorted(path for path in folder.rglob("*"))


def places(tmp_path):
    """Return folders that cannot be exported to, by what a message says of them."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "here").mkdir()
    return {
        "file": "is a file; give a folder",
        "file/below": "cannot be written",
        "file/below/it": "cannot be written",
        "full": "holds thesis.txt; give another folder",
        "link": "holds thesis.txt; give another folder",
        "loop": "cannot be written",
        "n" * 300: "cannot be written (File name too long)",
        "nul\0": "cannot be written",
        "/proc/nothing": "cannot be written",
        "/proc/nothing/below": "cannot be written",
        "/dev/null": "is a file; give a folder",
        "/dev/full/below": "cannot be written",
        "/": "is to be replaced by the bundle, but",
        "here": "is to be replaced by the bundle, but is in use; give a folder in it",
        "": "is to be replaced by the bundle, but is in use; give a folder in it",
        ".": "is to be replaced by the bundle, but is in use; give a folder in it",
    }


def test_where_nothing_can_be_exported_to_is_said_before_anything_is_made(tmp_path, monkeypatch):
    expected = places(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    before = everything(tmp_path)
    for out, message in expected.items():
        folder = Path(out) if out in ("", ".") else tmp_path / out
        with pytest.raises(InputError) as caught:
            require_place(folder)
        assert str(caught.value).startswith(f"--out {folder}: ")
        assert message in str(caught.value), out
        assert len(str(caught.value).splitlines()) == 1
        assert everything(tmp_path) == before


def test_a_place_that_is_fine_is_left_as_it_was(tmp_path):
    for out in ("new", "two/levels", "n" * 255):
        require_place(tmp_path / out)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("most", [100, 3000])
def test_what_cannot_be_written_whole_is_said_and_leaves_nothing(folder, existing, most):
    rows = held_out((4,))
    made = tabular(rows)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # every file beyond it ends as on a full disk
    try:
        with pytest.raises(ExportError, match=r"s cannot be written \(.+\); nothing was exported$"):
            export(made, rows, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert contents(folder) == existing
    assert [path.name for path in folder.parent.iterdir()] == ["s"]


ON_A_FULL_DISK = """
import sys
from pathlib import Path

from hpo.export.formats import write
from tests.test_bundle import held_out, wide

rows = held_out((4,))
made = wide(rows)
for kind in sys.argv[2:]:
    try:
        write(kind, made, made.predictor(), rows, Path(sys.argv[1]))
    except OSError as error:
        print(kind, error.strerror)
"""


def test_a_full_disk_ends_no_process_and_is_said_of_each_format(tmp_path):
    kinds = [kind for kind in FILE_OF if kind != "onnx"]  # whose packages take seconds to import
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be made here, which needs root")
    try:
        done = warm.run(ON_A_FULL_DISK, disk, *kinds)  # a process, since torch's own writer of some would end it
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.stdout.splitlines() == [f"{kind} No space left on device" for kind in kinds], done.stderr


def test_a_link_is_followed_and_the_longest_name_is_taken(tmp_path):
    rows = held_out((4,))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "nowhere").symlink_to(tmp_path / "later")
    for out in ("link", "nowhere", "n" * 255):
        require_place(tmp_path / out)
        export(tabular(rows), rows, tmp_path / out)
        assert (tmp_path / out / "bundle.json").is_file()
    assert (tmp_path / "link").is_symlink()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def changed(folder, name, change):
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


def said_of(folder, **keys):
    if keys:
        file = folder / "bundle.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(InputError) as caught:
        hpo.load_bundle(folder)
    return str(caught.value)


TAMPERED = {
    "one bit": ("model.pt", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], "is not what was exported"),
    "cut off": ("model.torchscript.pt", lambda b: b[:-10], "is cut off, or another file"),
    "empty": ("model.pt", lambda b: b"", "has 0 bytes, but"),
    "no json": ("bundle.json", lambda b: b[:-10], "bundle.json: cannot be read ("),
    "binary": ("bundle.json", lambda b: b"\xff\x00", "bundle.json: cannot be read ("),
    "a list": ("bundle.json", lambda b: b"[]", "is no description of an hpo bundle"),
    "a number": (
        "bundle.json",
        lambda b: b.replace(b'"class_names": [', b'"class_names": 7, "x": ['),
        "is damaged, class",
    ),
    "no inputs": (
        "bundle.json",
        lambda b: b.replace(b'"inputs": [', b'"inputs": [], "x": ['),
        "does not describe the inp",
    ),
    "no digest": ("bundle.json", lambda b: b.replace(b'"files": {', b'"files": {"model.onnx": {}, '), "no checksum of"),
    "foreign": ("bundle.json", lambda b: b'{"format": "pt"}', "is no description of an hpo bundle"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_bundle_is_not_loaded(folder, how):
    rows = held_out((4,))
    export(tabular(rows), rows, folder)
    hpo.load_bundle(folder)
    name, change, message = TAMPERED[how]
    changed(folder, name, change)
    assert message in said_of(folder)


def test_what_is_missing_or_of_a_later_version_is_said(folder):
    rows = held_out((4,))
    about = export(tabular(rows), rows, folder)
    assert about["files"]["model.pt"]["bytes"] == (folder / "model.pt").stat().st_size
    assert "is of format 99, and this hpo reads up to" in said_of(folder, format=99)
    assert "has no checksum of model.torchscript.pt" in said_of(folder, format=2, files={})
    (folder / "model.pt").unlink()
    assert "model.pt: is missing, which bundle.json names" in said_of(folder, files=about["files"])
    (folder / "bundle.json").unlink()
    assert "is no bundle, there is no bundle.json" in said_of(folder)


def test_a_bundle_of_the_first_format_is_loaded(folder):
    """As version 0.2 wrote it: no checksums, columns, or kind of outputs."""
    rows = held_out((4,))
    about = export(tabular(rows), rows, folder)
    for key in set(about) - OLD_KEYS:
        del about[key]
    del about["output"]["values"]
    (folder / "bundle.json").write_text(json.dumps(about | {"format": 1}))
    changed(folder, "model.pt", lambda b: b[:-1])
    answer = hpo.load_bundle(folder).predict(rows.inputs["features"])
    assert answer.columns.tolist() == ["class", "probability"]


OLD_KEYS = {*ABOUT, "params", "inputs", "output", "feature_names", "class_names", "n_parameters", "versions"}


def test_no_pickle_of_a_bundle_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = held_out((4,))
    export(tabular(rows), rows, folder)

    class Evil:
        def __reduce__(self):
            return (open, ("ran", "w"))

    for name in ("model.pt", "model.torchscript.pt"):
        torch.save(Evil(), folder / name)
    assert "was not loaded" in said_of(folder) or "is cut off" in said_of(folder)
    assert "cannot be read as a TorchScript model" in said_of(folder, format=1)  # without checksums
    assert not Path("ran").exists()


EXTRAS = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("kind", EXTRAS)
def test_every_format_gives_the_same_where_hpo_cannot_be_imported(folder, kind):
    for package in EXTRAS[kind]:
        pytest.importorskip(package)
    rows = held_out((4,))
    about = export(tabular(rows), rows, folder, {**ALWAYS, kind: True}, fresh=True)
    assert set(about["files"]) == {"model.pt", "model.torchscript.pt", FILE_OF[kind], "MODEL.md"}
    for name in ("model.torchscript.pt", FILE_OF[kind]):
        found = about["parity"][name]["fresh_process"]
        assert found["max_difference"] <= TOLERANCE
        assert found["batch_sizes"] == [1, 2, 257]
    hpo.load_bundle(folder)
    require_place(folder)  # such a bundle may be replaced


def test_several_inputs_keep_their_names_in_onnx(folder):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = held_out((3,), (2,))
    made = model(Sum(), rows, Twice(), nn.Sigmoid())
    export(made, rows, folder, {**ALWAYS, "onnx": True, "pt2": True}, fresh=True)
    session = runtime.InferenceSession(folder / "model.onnx")
    assert [each.name for each in session.get_inputs()] == ["features", "other"]
    assert [each.name for each in session.get_outputs()] == ["prediction"]
    one = {name: x[:1].numpy() for name, x in rows.inputs.items()}
    expected = predictions(made.predictor(), rows)[:1]
    torch.testing.assert_close(torch.from_numpy(session.run(None, one)[0]), expected, atol=TOLERANCE, rtol=0)


def test_quantiles_are_in_onnx_too(folder):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = held_out((4,), n=2000)
    made = model(MLP(4, [8], 2), rows, QuantileNormal(rows.inputs["features"][:1000]))
    about = export(made, rows, folder, {**ALWAYS, "onnx": True}, fresh=True)
    assert about["parity"]["model.onnx"]["fresh_process"]["max_difference"] <= TOLERANCE
    wide = torch.cat([rows.inputs["features"], 1e3 * torch.randn(100, 4), rows.inputs["features"][:1].repeat(3, 1)])
    session = runtime.InferenceSession(folder / "model.onnx")
    found = torch.from_numpy(session.run(None, {"features": wide.numpy()})[0])
    torch.testing.assert_close(found, made.predictor()(wide), atol=TOLERANCE, rtol=0)


def test_what_onnx_lacks_is_what_torch_has():
    share = torch.cat([torch.rand(10_000, dtype=torch.float64), torch.tensor([0, 1e-300, 1e-12, 0.5, 1 - 1e-12, 1])])
    torch.testing.assert_close(ndtri(share), torch.special.ndtri(share), atol=1e-13, rtol=1e-13)
    rising = torch.randint(0, 9, (3, 7)).sort(-1).values
    values = torch.randint(-1, 10, (3, 50))
    for right in (False, True):
        torch.testing.assert_close(
            searchsorted(rising, values, right=right), torch.searchsorted(rising, values, right=right)
        )
    torch.testing.assert_close(
        searchsorted(rising, values, side="right"), torch.searchsorted(rising, values, side="right")
    )


def test_what_a_format_cannot_hold_is_said_and_nothing_changes(folder, existing):
    rows = held_out((4,))
    with pytest.raises(ExportError, match=r"the model cannot be exported as pt2: .+; leave pt2 out of --formats"):
        export(model(Branchy(), rows), rows, folder, {**ALWAYS, "pt2": True})
    assert contents(folder) == existing
    assert [path.name for path in folder.parent.iterdir()] == ["s"]


def test_what_nobody_asked_for_is_left_out_where_it_cannot_be(folder, said, capfd):
    rows = held_out((4,))
    about = export(model(Branchy(), rows), rows, folder, formats_of(None))
    assert set(about["files"]) == {"model.pt", "model.torchscript.pt", "MODEL.md"}
    assert about["pt2"]["not_exported"]
    assert "the model cannot be exported as pt2: " in said[0]
    assert "forward(" not in capfd.readouterr().err  # torch's own graph
    assert set(export(tabular(rows), rows, folder, formats_of(None))["files"]) > {"model.pt2"}


class Counting(nn.Module):
    """Takes the number of rows as a plain number, which torch.export then holds to be any batch's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x) + x.new_zeros(len(x), 1)


class Rounding(nn.Module):
    """Gives other numbers of a row alone, which torch.export does not see in its example of several."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        if x.shape[0] == 1:
            return self.linear(x).round(decimals=1)
        return self.linear(x)


def without_guards(monkeypatch):
    """Have no fixed number of rows refused by us, so that what is exported is first found wrong where it is called."""
    monkeypatch.setattr("hpo.export.formats._require_any_size", lambda program: None)


@pytest.mark.parametrize(
    ("network", "guards", "why"),
    [
        (Counting, True, "a model of batches of 3 rows only"),
        (Counting, False, "model.pt2 gives no predictions for a batch of 1 (Guard failed: "),
        (Rounding, True, "model.pt2 is not the model that was measured: its predictions differ by up to 0.0"),
    ],
)
def test_an_optional_format_is_left_out_whatever_is_wrong_with_it(folder, said, monkeypatch, network, guards, why):
    if not guards:
        without_guards(monkeypatch)
    rows = held_out((4,))
    about = export(model(network(), rows), rows, folder, formats_of(None), fresh=True)
    assert set(about["files"]) == {"model.pt", "model.torchscript.pt", "MODEL.md"}
    assert "model.pt2" not in about["parity"]
    assert why in about["pt2"]["not_exported"]
    assert said[0] == f"the bundle has no model.pt2, which nothing else needs: {about['pt2']['not_exported']}"
    asked = formats_of("pt2")
    with pytest.raises(ExportError) as error:
        export(model(network(), rows), rows, folder.with_name("asked"), asked)
    assert why[:-1] in str(error.value)
    assert str(error.value).endswith("; leave pt2 out of --formats")
    assert not folder.with_name("asked").exists()


def test_onnx_runtimes_own_error_is_said_in_a_line(folder, monkeypatch, capfd):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    without_guards(monkeypatch)
    rows = held_out((4,))
    with pytest.raises(ExportError, match=r"^model.onnx gives .+ a batch of \d.*; leave onnx out of --formats$"):
        export(model(Counting(), rows), rows, folder, {**ALWAYS, "onnx": True})
    assert "onnxruntime" not in capfd.readouterr().err


def test_an_optional_file_that_only_a_fresh_process_finds_wrong_is_left_out(folder, said, monkeypatch):
    def fails(eager, folder, files, held_out):
        if "model.pt2" in files:
            raise ExportError("what was exported cannot be loaded in a fresh process (odd); nothing was exported")
        return {file: {"max_difference": 0.0} for file in files}

    monkeypatch.setattr("hpo.export.bundle.fresh_parity", fails)
    rows = held_out((4,))
    about = export(tabular(rows), rows, folder, formats_of(None), fresh=True)
    assert (
        set(about["files"])
        == set(about["parity"]) | {"MODEL.md"}
        == {
            "model.pt",
            "model.torchscript.pt",
            "MODEL.md",
        }
    )
    assert about["parity"]["model.torchscript.pt"]["fresh_process"]
    assert said[-1].endswith("which nothing else needs: what was exported cannot be loaded in a fresh process (odd)")
    with pytest.raises(ExportError, match=r"fresh process \(odd\); nothing was exported$"):
        export(tabular(rows), rows, folder, formats_of("pt2"), fresh=True)


@pytest.mark.usefixtures("started")
def test_a_file_that_only_a_fresh_process_finds_wrong_is_refused(folder, monkeypatch):
    rows = held_out((4,))
    monkeypatch.setattr("hpo.export.bundle.parity_of", lambda *args: {"max_difference": 0.0, "tolerance": TOLERANCE})
    with pytest.raises(ExportError, match=r"model.torchscript.pt is not the model that was measured: .+ 0.01 "):
        export(model(Shifted(4, 2), rows), rows, folder, fresh=True)
    assert list(folder.parent.iterdir()) == []


def test_formats_are_named_or_refused():
    assert list(formats_of("pt2")) == list(formats_of(" torchscript , pt2,pt2,")) == [*ALWAYS, "pt2"]
    with pytest.raises(InputError, match=r"--formats: must be of state_dict, .+ but got 'pt3'; did you mean \"pt2\""):
        formats_of("pt3")


def test_a_format_whose_library_is_not_there_says_which_to_install(monkeypatch):
    monkeypatch.setattr("hpo.export.formats.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--formats safetensors: needs safetensors; pip install 'hpo\[safetensors\]'"):
        formats_of("safetensors")


def test_bundle_json_and_the_card_have_the_facts(folder):
    rows = held_out((2,))
    made = model(nn.Linear(2, 2), rows, head=nn.Softmax(dim=-1))
    about = export(made, rows, folder)
    assert about["format"] == 2
    assert about["example"] == {
        name: pytest.approx(float(x)) for name, x in zip("ab", rows.inputs["features"][0], strict=True)
    }
    assert set(about["latency_ms"]) == {"1", "256"}
    assert about["columns"][1] == {"name": "b", "kind": "number", "input": "features"}
    card = (folder / "MODEL.md").read_text()
    for fact in ("# s\n", "objective `o`, trial 3", "| a | a number |", "a probability for each class", "no, yes"):
        assert fact in card


CPP = """
#include <torch/script.h>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
    torch::jit::script::Module model = torch::jit::load(argv[1]);
    model.eval();
    torch::NoGradGuard no_grad;
    const int rows = std::atoi(argv[2]), columns = std::atoi(argv[3]);
    torch::Tensor x = torch::empty({rows, columns});
    for (int i = 0; i < rows * columns; ++i) {
        float value;
        if (std::scanf("%f", &value) != 1) return 1;
        x.data_ptr<float>()[i] = value;
    }
    torch::Tensor y = model.forward({x}).toTensor().contiguous();
    for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\\n", y.data_ptr<float>()[i]);
}
"""


def compiled(folder):
    """Return a program that loads TorchScript, built against the libtorch of the installed torch; else skip."""
    source, program = folder / "predict.cpp", folder / "predict"
    source.write_text(CPP)
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (g++)")
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder / part}" for part in ("include", "include/torch/csrc/api/include")]
    libraries = torch_folder / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-O0", abi, *includes, f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    links = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--allow-shlib-undefined"]
    command = [compiler, *flags, str(source), "-o", str(program), *links]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.mark.slow
def test_a_program_in_cpp_predicts_the_same(folder, tmp_path):
    program = compiled(tmp_path)
    rows = held_out((4,))
    made = tabular(rows)
    export(made, rows, folder)
    given = " ".join(f"{value:.9g}" for value in rows.inputs["features"].ravel().tolist())
    command = [str(program), str(folder / "model.torchscript.pt"), str(len(rows)), "4"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    seen = torch.tensor([float(line) for line in done.stdout.split()]).reshape(-1, 2)
    torch.testing.assert_close(seen, predictions(made.predictor(), rows), atol=TOLERANCE, rtol=0)
