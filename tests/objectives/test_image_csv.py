"""Images of one's own: what can be wrong with them is said in one line; transforms and weights from a file."""

import pytest
import torch
from hpo.objectives.image_csv import ImageCsv, Options
from hpo.objectives.models import Augmented, NormalizePixels, SmallConvNet, torchvision_classifier
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from hpo.errors import DataError, InputError
from hpo.export.bundle import export
from hpo.export.model import Model
from hpo.study.loading import load
from tests.cli import invoke, summary

N = 20


@pytest.fixture
def folder(tmp_path):
    """A folder of 20 images, the even ones red and the odd ones blue, and a CSV that names them."""
    (tmp_path / "images").mkdir()
    for i in range(N):
        pixels = torch.randint(0, 50, (10, 12, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        pixels[:, :, 2 * (i % 2)] += 200
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    write(tmp_path, [f"{i}.png,{'red' if i % 2 == 0 else 'blue'}" for i in range(N)])
    return tmp_path


def write(folder, rows, header="image,label"):
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def rows(folder):
    return (folder / "labels.csv").read_text().splitlines()[1:]


def objective(folder, **options):
    return ImageCsv(Options(file=folder / "labels.csv", **({"size": 8} | options)))


def built(each, **params):
    data = each.data()
    return each.build({**each.defaults, **params}, data.info)


def faults(folder, **options):
    _, found = load("image_csv", {"file": str(folder / "labels.csv"), **options}, folder)
    return [fault.message for fault in found]


def test_images_are_resized_and_split_with_each_class_in_its_share(folder):
    data = objective(folder).data()
    assert [len(split) for split in data.splits.values()] == [12, 4, 4]
    assert data.class_names == ("blue", "red")
    assert data.info.inputs == {"pixels": (3, 8, 8)}
    assert data.info.input_dtypes == {"pixels": "uint8"}
    for split in data.splits.values():
        assert split.targets.double().mean() == 0.5
        is_red = split.inputs["pixels"][:, 0].float().mean((1, 2)) > 100
        assert torch.equal(is_red, split.targets == 1)


def test_images_are_beside_the_csv_or_in_images_there_or_where_the_option_says(folder, tmp_path_factory):
    expected = objective(folder).data().fingerprint()
    assert objective(folder, images=folder / "images").data().fingerprint() == expected
    write(folder, [f"images/{row}" for row in rows(folder)])
    assert objective(folder).data().fingerprint() == expected
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(DataError, match=r"labels\.csv:2: there is no image .*elsewhere"):
        objective(folder, images=elsewhere).data()


def test_columns_are_the_first_two_or_those_that_are_named(folder):
    expected = objective(folder).data().fingerprint()
    write(folder, [f"x,{row.split(',')[1]},{row.split(',')[0]}" for row in rows(folder)], "id, kind, file name")
    named = objective(folder, file_column="file name", label_column="kind")
    assert named.data().fingerprint() == expected
    with pytest.raises(DataError, match=r"labels\.csv:1: there is no column 'file_name'; did you mean \"file name\"\?"):
        objective(folder, file_column="file_name", label_column="kind").data()


def test_labels_are_renamed_and_merged(folder):
    write(folder, [f"{i}.png,{i % 4}" for i in range(N)])
    merged = load("image_csv", {"file": str(folder / "labels.csv"), "label_transform": {0: "low", 1: "low"}}, folder)[0]
    data = merged.data()
    assert data.class_names == ("2", "3", "low")
    assert data.info.class_counts[2] == 2 * data.info.class_counts[0]
    with pytest.raises(DataError, match="no row has the label 'lo'"):
        objective(folder, label_transform={"lo": "low"}).data()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "labels.csv").unlink(), r"labels\.csv: it cannot be read as a CSV in UTF-8 \(No such file"),
        (lambda f: (f / "labels.csv").write_bytes(b"image,label\n\xff\xfe,x\n"), r"labels\.csv: it cannot be read as"),
        (lambda f: (f / "labels.csv").write_text(""), r"labels\.csv:1: two columns are needed"),
        (lambda f: write(f, ["0.png"], "image"), r"labels\.csv:1: two columns are needed.*\['image'\]"),
        (lambda f: write(f, []), r"labels\.csv: it has no rows"),
        (lambda f: write(f, rows(f)[1:], rows(f)[0]), r"labels\.csv:1: '0\.png' is an image, so a header is missing"),
        (lambda f: write(f, [*rows(f)[:3], "3.png,"]), r"labels\.csv:5: the row has no label"),
        (lambda f: write(f, [*rows(f)[:3], "3.png"]), r"labels\.csv:5: the row has no label"),
        (lambda f: write(f, [*rows(f)[:3], ",red"]), r"labels\.csv:5: the row has no file name"),
        (lambda f: write(f, [*rows(f), "1.png,red"]), r"labels\.csv:22: 1\.png stands in line 3 already"),
        (lambda f: write(f, [*rows(f), "20.png,red"]), r"labels\.csv:22: there is no image .*20\.png nor .*20\.png"),
        (lambda f: write(f, rows(f)[::2]), r"all 10 rows have the label 'red'"),
        (lambda f: write(f, rows(f)[:3]), r"3 images are too few for 2 classes in three splits \('blue' has 1\)"),
        (lambda f: (f / "images/4.png").write_bytes(b""), r"labels\.csv:6: .*4\.png is no image that can be read"),
        (lambda f: (f / "images/4.png").write_text("no"), r"labels\.csv:6: .*4\.png is no image that can be read"),
        (
            lambda f: (f / "images/4.png").write_bytes((f / "images/4.png").read_bytes()[:-30]),
            r"labels\.csv:6: .*4\.png is no image that can be read \(.*truncated",
        ),
    ],
)
def test_bad_input_is_said_in_one_line_with_file_and_row(folder, change, message):
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        objective(folder).data()
    assert "\n" not in str(caught.value)


def test_grey_palette_and_transparent_images_are_images(folder):
    for i, mode in enumerate(("L", "P", "RGBA", "1", "CMYK")):
        Image.new(mode, (5, 7)).save(folder / f"images/{i}.png" if mode != "CMYK" else folder / f"images/{i}.jpg")
    write(folder, [row.replace("4.png", "4.jpg") if row.startswith("4.") else row for row in rows(folder)])
    objective(folder).data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vgg17"}, "model: must be small or of torchvision.models, but got 'vgg17'; did you mean \"vgg1"),
        ({"size": 4}, "size: must be at least 8, but got 4"),
        ({"transforms": ["RandomHorizontlFlip"]}, 'did you mean "RandomHorizontalFlip"?'),
        ({"transforms": [{"RandomHorizontalFlip": {"q": 1}}]}, "unexpected keyword argument 'q'"),
        ({"transforms": ["MixUp"]}, "transforms: must take an image, but got MixUp: "),
        (
            {"transforms": [{"CenterCrop": {"size": 9}}]},
            "must keep an image's size, but got {'CenterCrop': {'size': 9}}",
        ),
        ({"transforms": [{"RandomHorizontalFlip": {}, "RandomVerticalFlip": {}}]}, "an entry must have one name"),
        ({"transforms": [{}]}, "an entry must have one name, but got {}"),
        ({"transform": []}, 'unknown option; did you mean "transforms"?'),
    ],
)
def test_wrong_options_are_faults_of_the_study_file(folder, options, message):
    [found] = faults(folder, **options)
    assert message in found


def test_transforms_are_for_training_only_and_each_image_has_its_own():
    normalize = NormalizePixels(mean=[0.5] * 3, std=[0.25] * 3)
    seen = []

    def note(image):
        seen.append(image)
        return image

    network = Augmented(nn.Identity(), [note, v2.RandomHorizontalFlip(0.5)], normalize)
    x = normalize(torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8))
    assert torch.equal(network.eval()(x), x)
    assert not seen
    torch.manual_seed(0)
    out = network.train()(x)
    assert len(seen) == 32
    assert torch.stack(seen).min() >= -1e-6
    assert torch.stack(seen).max() <= 1 + 1e-6
    kept, flipped = (torch.isclose(out, y, atol=1e-5).all((1, 2, 3)) for y in (x, x.flip(-1)))
    assert (kept | flipped).all()
    assert kept.any()
    assert flipped.any()
    torch.manual_seed(0)
    assert torch.equal(network(x), out)


def test_transforms_are_no_part_of_what_is_exported(folder, tmp_path):
    each = objective(folder, transforms=["RandomHorizontalFlip", {"ColorJitter": {"brightness": 0.5}}])
    data = each.data()
    network = built(each)
    about = {"study": "s"}
    parts = {"preprocess": each.preprocess(data.train), "network": network, "head": each.head()}
    told = export(Model(**parts, params=each.defaults, info=data.info, about=about), data.test, tmp_path / "bundle")
    assert told["torchscript"]["compiled"] == "script"
    loaded = torch.jit.load(tmp_path / "bundle/model.torchscript.pt")
    assert not {"rand", "flip"} & {word for word in str(loaded.inlined_graph).replace("::", " ").split()}
    plain = nn.Sequential(parts["preprocess"], network.network, parts["head"]).eval()
    pixels = data.test.inputs["pixels"]
    torch.testing.assert_close(loaded(pixels), plain(pixels), atol=1e-5, rtol=0)


def test_weights_come_from_a_file_all_but_a_last_layer_of_another_shape(folder):
    torch.manual_seed(1)
    file = folder / "weights.pt"
    torch.save(torchvision_classifier("resnet18", 1000, 32).state_dict(), file)
    network = built(objective(folder, model="resnet18", weights=file))
    state = torch.load(file, weights_only=True)
    own = network.state_dict()
    assert {name for name, tensor in own.items() if not torch.equal(tensor, state[name])} == {"fc.weight", "fc.bias"}
    assert own["fc.weight"].shape == (2, 512)
    torch.save(network.state_dict(), file)
    again = built(objective(folder, model="resnet18", weights=file)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


def test_weights_of_something_else_are_refused(folder):
    file = folder / "weights.pt"
    small = objective(folder, weights=file)
    with pytest.raises(InputError, match=r"weights\.pt holds no state_dict .*FileNotFoundError"):
        built(small)
    file.write_text("no")
    with pytest.raises(InputError, match=r"weights\.pt holds no state_dict that loads with weights_only=True"):
        built(objective(folder, weights=file))
    torch.save(nn.Linear(3, 2), file)  # a pickled module
    with pytest.raises(InputError, match=r"weights\.pt holds no state_dict that loads with weights_only=True"):
        built(objective(folder, weights=file))
    torch.save(SmallConvNet(8, 2).state_dict(), file)
    with pytest.raises(
        InputError, match=r"does not fit .* layers\.conv1\.weight is \(8, 3, 3, 3\), not \(16, 3, 3, 3\)"
    ):
        built(objective(folder, weights=file))
    torch.save(SmallConvNet(16, 2).state_dict() | {"more": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="in 1 of its tensors: more is unknown"):
        built(objective(folder, weights=file))


def test_a_study_trains_exports_and_its_bundle_is_where_another_begins(folder, monkeypatch):
    monkeypatch.chdir(folder)
    study = """objective: image_csv
trials: 1
epochs: 2
tracking: off
params: {n_channels: 8, learning_rate: {type: float, low: 1.0e-9, high: 2.0e-9}}
options: {file: labels.csv, size: 8, """
    (folder / "a.yaml").write_text(study + "transforms: [RandomHorizontalFlip]}")
    assert summary(invoke("run", "a.yaml", "--json"))["trials"]["complete"] == 1
    (folder / "b.yaml").write_text(study + "weights: mlruns/bundles/a/model.pt}")
    assert summary(invoke("run", "b.yaml", "--json"))["trials"]["complete"] == 1
    first, second = (
        torch.load(f"mlruns/bundles/{name}/model.pt", weights_only=True)["model_state_dict"] for name in "ab"
    )
    weight = "network.layers.conv1.weight"
    torch.testing.assert_close(second[weight], first[f"network.{weight}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "vit_b_32", "squeezenet1_0"])
def test_classifiers_that_need_arguments_of_their_own_give_logits(name):
    size = 96
    with torch.device("meta"):
        network = torchvision_classifier(name, 3, size)
        assert network.train()(torch.zeros(2, 3, size, size)).shape == (2, 3)
