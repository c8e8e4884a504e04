"""Several attributes: data that has them, the convolutional model, and drawn faces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FACE_ATTRIBUTES, SHOWN, WHERE, draw_celeba, run_dgrad
from PIL import Image
from torch import Generator, Tensor

import dgrad
from dgrad.config import configure, read_config
from dgrad.core.objectives import FunctionObjective
from dgrad.data import Dataset, Split, choose_labelled_attributes, load_dataset, load_npz, unit
from dgrad.pictures.image_grids import class_grid, save_grid, toggle_attributes
from dgrad.training.run_directory import Run
from dgrad.training.trained_model import load_model
from dgrad.training.trainer import Trainer
from dgrad.vae.evaluation import evaluate_accuracies, evaluate_bound
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE
from dgrad_plugins.datasets._celeba import load_celeba
from dgrad_plugins.models._convolutional import conv_vae

COUNTS = (500, 60, 100)
SETTINGS = {
    "dataset": "celeba", "attributes": ",".join(SHOWN), "labels": 150, "labelled-batch": 8, "batch-size": 16,
    "latent": "3x2", "model": "conv", "hidden": "8,16,16", "gaussian": 16, "binarize": "none", "estimator": "direct",
    "lr": "cosine:0.007:0", "device": "cpu",
    "eval-samples": 1, "eval-every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with drawn faces as CelebA."""
    pytest.importorskip("torchvision")
    path = tmp_path_factory.mktemp("data")
    draw_celeba(path, COUNTS)
    return path


def _small(path: Path) -> Path:
    pytest.importorskip("torchvision")
    draw_celeba(path, (5, 2, 3))
    return path


def _error(function: Callable[[], object]) -> str:
    with pytest.raises(dgrad.InputError, match=r"\A[^\n]+\Z") as error:
        function()
    return str(error.value)


# CelebA


def test_celeba_is_cut_and_made_smaller_in_its_own_partition(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    values = draw_celeba(tmp_path, (5, 2, 3))
    dataset = load_celeba(tmp_path)
    assert dataset.attributes == FACE_ATTRIBUTES
    assert dataset.image_shape == (3, 64, 64)
    parts = (dataset.train, dataset.valid, dataset.test)
    assert [len(part) for part in parts] == [5, 2, 3]
    assert torch.equal(torch.cat([part.labels for part in parts]), torch.from_numpy(values))
    with Image.open(tmp_path / "celeba" / "img_align_celeba" / "000007.jpg") as image:
        middle = image.crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1)
    assert torch.equal(dataset.valid.images[1], expected)


def test_celeba_is_made_smaller_once_and_again_when_its_lists_change(tmp_path: Path) -> None:
    folder = _small(tmp_path) / "celeba"
    first = load_celeba(tmp_path)
    Image.new("RGB", (178, 218)).save(folder / "img_align_celeba" / "000001.jpg")
    again = load_celeba(tmp_path)
    assert torch.equal(again.train.images, first.train.images) and first.train.images[0].any()
    partition = folder / "list_eval_partition.txt"
    partition.write_text(partition.read_text() + "\n")
    with pytest.raises(dgrad.InputError, match="cannot be read"):
        load_celeba(tmp_path)
    partition.write_text(partition.read_text().strip())
    assert not load_celeba(tmp_path).train.images[0].any()
    assert not list(folder.glob(".dgrad*"))


def test_what_is_wrong_with_celebas_files_is_said(tmp_path: Path) -> None:
    assert f"{tmp_path / 'celeba'} has no img_align_celeba, no list_attr_celeba.txt" in _error(
        lambda: load_celeba(tmp_path)
    )
    folder = _small(tmp_path) / "celeba"
    (folder / "list_bbox_celeba.txt").rename(folder / "elsewhere")
    assert "has no list_bbox_celeba.txt; expected" in _error(lambda: load_celeba(tmp_path))
    (folder / "elsewhere").rename(folder / "list_bbox_celeba.txt")
    (folder / "img_align_celeba" / "000004.jpg").write_bytes(b"no image")
    assert "000004.jpg of img_align_celeba cannot be read" in _error(lambda: load_celeba(tmp_path))
    (folder / "list_attr_celeba.txt").write_text("no list\n")
    assert "the lists in" in _error(lambda: load_celeba(tmp_path))
    assert not (folder / "dgrad-64").exists() and not list(folder.glob(".dgrad*")), "nothing half-written"


# Attributes of any data


def _attributes(count: int = 40, n: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 2, (count, n))


def _npz(**arrays: np.ndarray) -> Path:
    images = np.random.RandomState(1).randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    np.savez("data.npz", **{"images": images, **arrays})
    return Path("data.npz")


def test_an_npz_may_have_attributes() -> None:
    values = _attributes()
    images = np.zeros((40, 16, 16, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    images[:, 1, 1] = 255
    dataset = load_npz(_npz(images=images, attributes=values, attribute_names=np.array(["a", "b", "c"])))
    assert dataset.attributes == ("a", "b", "c") and dataset.classes is None
    for part in (dataset.train, dataset.valid, dataset.test):
        assert torch.equal(part.labels, torch.from_numpy(values)[part.images[:, 0, 0, 0].long()])
    assert load_npz(_npz(attributes=values.astype(bool))).attributes == ("0", "1", "2")


def test_an_npz_with_splits_may_have_attributes() -> None:
    values, parts = _attributes(), {"train": slice(0, 20), "valid": slice(20, 30), "test": slice(30, 40)}
    images = np.zeros((40, 16, 16), np.uint8)
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    np.savez("data.npz", **arrays, **{f"{name}_attributes": values[part] for name, part in parts.items()})
    dataset = load_npz(Path("data.npz"))
    assert torch.equal(dataset.valid.labels, torch.from_numpy(values[20:30]))
    np.savez("data.npz", **arrays, train_attributes=values[:20])
    assert "attributes for some of its splits" in _error(lambda: load_npz(Path("data.npz")))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"attributes": np.zeros(40, int)}, "attributes have the shape [40]; expected [40, n]"),
        ({"attributes": np.zeros((39, 2), int)}, "attributes have the shape [39, 2]; expected [40, n]"),
        ({"attributes": np.full((40, 2), -1)}, "with other values than 0 and 1"),
        ({"attributes": np.zeros((40, 2))}, "are float64"),
        ({"attributes": _attributes(), "labels": np.zeros(40, int)}, "both labels and attributes"),
        ({"attributes": _attributes(), "attribute_names": np.array(["a", "a", "b"])}, "expected 3 different names"),
        ({"attributes": _attributes(), "attribute_names": np.array(["a", "b"])}, "expected 3 different names"),
        ({"attributes": _attributes(), "attribute_names": np.array(["a,b", "c", "d"])}, "without commas"),
    ],
    ids=["flat", "short", "signs", "floats", "both", "twice", "few", "comma"],
)
def test_other_attributes_are_refused(arrays: dict[str, np.ndarray], expected: str) -> None:
    assert expected in _error(lambda: load_npz(_npz(**arrays)))


def test_attributes_are_chosen_by_name() -> None:
    values = _attributes()
    dataset = load_npz(_npz(attributes=values, attribute_names=np.array(["a", "b", "c"])))
    chosen = dataset.with_attributes(["c", "a"])
    assert chosen.attributes == ("c", "a")
    assert torch.equal(chosen.test.labels, dataset.test.labels[:, [2, 0]])
    assert "unknown attribute 'd'; known: a, b, c" in _error(lambda: dataset.with_attributes(["d"]))
    plain = load_npz(_npz())
    assert "data.npz has no attributes" in _error(lambda: plain.with_attributes(["a"]))
    whole = dataset.train
    assert "expected a name of its own for each" in _error(lambda: Dataset("toy", whole, whole, whole))
    assert "expected a name of its own for each" in _error(
        lambda: Dataset("toy", whole, whole, whole, None, ("a", "b"))
    )


def test_any_images_keep_their_attributes_but_both_values_of_each_are_among_them() -> None:
    labels = torch.from_numpy(_attributes(1000, 4))
    labels[:, 3] = torch.arange(1000) < 3
    chosen = choose_labelled_attributes(labels[:, :3], 100, seed=5)
    assert len(chosen.unique()) == 100 and torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, choose_labelled_attributes(labels[:, :3], 100, seed=5))
    assert not torch.equal(chosen, choose_labelled_attributes(labels[:, :3], 100, seed=6))
    assert "alike in 1 of 4 attributes" in _error(lambda: choose_labelled_attributes(labels, 10, seed=5))
    assert "at most 1000" in _error(lambda: choose_labelled_attributes(labels, 1001, seed=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent": "2x2"}, r"got --latent 2x2 and 3 attributes \(a, b, c\), expected 3x2"),
        ({"latent": "3x3"}, r"expected 3x2"),
        ({"attributes": "a,d"}, r"unknown attribute 'd'; known: a, b, c"),
        ({"attributes": "a,a", "latent": "2x2"}, r"--attributes must be different; got a,a"),
        ({"attributes": "a", "labels": 0}, r"--attributes must be given with --labels"),
        ({"independence-weight": -1}, r"--independence-weight must be a finite number of at least 0; got -1"),
        ({"model": "linear"}, r"the model linear has no Gaussian variables; got --gaussian 4"),
    ],
    ids=["few", "values", "unknown", "twice", "unlabelled", "weight", "linear"],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    path = _npz(attributes=_attributes(), attribute_names=np.array(["a", "b", "c"]))
    config = {"dataset": str(path), "labels": 20, "model": "conv", "latent": "3x2", "gaussian": 4, "device": "cpu"}
    with pytest.raises(dgrad.InputError, match=message):
        Trainer(configure({**config, **settings}))


def test_a_configuration_from_before_attributes_is_read() -> None:
    config = configure({"labels": 10, "latent": "1x10"})
    old = json.loads(config.to_json())
    del old["attributes"], old["independence_weight"]
    Path("config.json").write_text(json.dumps(old))
    assert read_config(Path("config.json")) == config


# The convolutional model


def _model(channels: int = 3, spec: str = "3x2", kind: str = "bernoulli") -> DiscreteVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = conv_vae(dgrad.latent(spec), (channels, 16, 32), likelihood(kind), (4, 6, 8, 8), gaussian=5)
    with torch.no_grad():
        model.decoder.first.weight[:, : len(model.layer.shape) * 3] *= 10  # as it may become
    return model.eval()


def _images(channels: int = 3, count: int = 4) -> Tensor:
    return torch.rand(count, channels, 16, 32, generator=Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_has_logits_gaussian_variables_and_pictures_of_the_right_shapes(channels: int) -> None:
    model, images = _model(channels), _images(channels)
    posterior = model.posterior(images)
    assert posterior.logits.shape == (4, 3, 2)
    assert posterior.gaussian is not None and posterior.gaussian.mean.shape == (4, 5)
    assert model.decode(model.layer.argmax(posterior.logits), posterior.mean).shape == images.shape
    with pytest.raises(dgrad.InputError, match="this model takes"):
        model.posterior(images[..., :16])


def test_the_decoder_sees_code_and_variables_side_by_side() -> None:
    model = _model()
    codes = model.layer.codes(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    gaussian = torch.arange(10.0).view(2, 5)
    expected = torch.cat([codes.flatten(1), gaussian], 1)
    assert torch.equal(model.decoder_inputs(codes, gaussian), expected)
    support = model.layer.enumerate(codes).unsqueeze(1)  # [8, 1, 3, 2]
    inputs = model.decoder_inputs(support, gaussian)
    assert inputs.shape == (8, 2, 11)
    assert torch.equal(inputs[..., 6:], gaussian.expand(8, 2, 5))
    assert torch.equal(inputs[..., :6], support.flatten(-2).expand(8, 2, 6))


@pytest.mark.parametrize("kind", ["bernoulli", "squared-error"])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_sweep_is_the_enumerated_one(kind: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = _model(kind=kind).double(), _images().double()
    generator = Generator().manual_seed(0)
    posterior = model.posterior(images)
    objective = model.reconstruction(images, posterior.draw(generator=generator))
    codes = model.layer.sample(posterior.logits, samples, generator=generator)
    truth = FunctionObjective(lambda codes: objective(codes)).sweep(codes)
    assert truth.std((2, 3)).min() > 1e-3
    for budget in (1, 2**30):
        monkeypatch.setattr("dgrad.kernels.code_sweeps.BYTES_PER_CALL", budget)
        torch.testing.assert_close(objective.sweep(codes), truth)
        torch.testing.assert_close(objective.at(codes).sweep(), truth)


def test_the_numbers_of_a_code_are_those_of_all_layers() -> None:
    model = _model()
    counted = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: counted.append(output.numel()))
        for module in model.decoder.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.ConvTranspose2d)
    ]
    model.decode(torch.zeros(1, 3, 2), torch.zeros(1, 5))
    for hook in hooks:
        hook.remove()
    assert model.numbers_per_code == sum(counted)


@pytest.mark.slow
def test_the_bound_of_a_large_decoder_is_drawn_and_that_of_a_small_one_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 200 draws is within 6 standard errors of the sum over all codes; both draw the Gaussian variables."""
    model, split = _model(), Split(_images(count=8))
    exact = evaluate_bound(model, split, samples=200, generator=Generator().manual_seed(0))
    monkeypatch.setattr("dgrad.vae.evaluation.EXACT_NUMBERS", 8 * model.numbers_per_code - 1)
    monkeypatch.setattr("dgrad.vae.evaluation.NUMBERS_AT_ONCE", 3000 * model.numbers_per_code)
    drawn = evaluate_bound(model, split, samples=200, generator=Generator().manual_seed(0))
    assert 0 < exact.standard_error < drawn.standard_error
    assert abs(drawn.bound - exact.bound) < 6 * (drawn.standard_error + exact.standard_error)


def test_a_grid_turns_one_attribute_at_a_time() -> None:
    model = _model()
    seen: list[Tensor] = []
    decode, model.decode = (
        model.decode,
        lambda codes, gaussian: seen.extend([codes, gaussian]) or decode(codes, gaussian),
    )  # type: ignore[method-assign]
    images = class_grid(model, 4, generator=Generator().manual_seed(0), variables=3)
    codes, gaussian = seen
    assert images.shape == (4, 6, 3, 16, 32)
    values = codes.argmax(-1)  # [rows, columns, n]
    assert (gaussian == gaussian[:, :1]).all()
    for variable in range(3):
        off, on = values[:, 2 * variable], values[:, 2 * variable + 1]
        assert (off[:, variable] == 0).all() and (on[:, variable] == 1).all()
        others = [other for other in range(3) if other != variable]
        assert torch.equal(off[:, others], on[:, others])
        assert torch.equal(
            off[:, others], values[:, 2 * others[0]][:, others].where(torch.tensor([False, True]), off[:, others])
        )


def test_headings_stand_above_their_columns() -> None:
    save_grid(Path("grid.png"), torch.zeros(1, 4, 3, 64, 64), headings=("Eyeglasses", "Smiling"))
    with Image.open("grid.png") as picture:
        pixels = np.array(picture)
    assert pixels.shape == (16 + 4 + 64 + 4, 4 * 68 + 4 + 12, 3)
    inked = np.flatnonzero((pixels[:18] < 128).any((0, 2)))
    assert inked.min() < 16 and (inked > 152).any() and not ((inked > 80) & (inked < 152)).any()


# Whole runs


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of the drawn faces, trained with the attributes of 150 of 500."""
    trainer = Trainer(configure({**SETTINGS, "data-root": str(root), "epochs": 8}))
    result = Run.create(tmp_path_factory.mktemp("runs") / "run", trainer.config)
    trainer.train(result)
    return result


@pytest.mark.slow
def test_the_attributes_of_test_images_are_known(run: Run) -> None:
    summary, metrics = run.summary(), run.metrics()
    assert summary is not None
    for figures in (summary["best"], summary["final"]):
        each = [figures[f"test_accuracy_{name}"] for name in SHOWN]
        assert figures["test_accuracy"] == pytest.approx(sum(each) / 3)
        assert min(each) >= 0.95, each
    assert summary["accuracy"] == summary["best"]["test_accuracy"]
    assert all(f"valid_accuracy_{name}" in metrics[-1] for name in SHOWN)


def _switched(run: Run, name: str) -> tuple[Tensor, Split]:
    """What switching an attribute on adds to each test image's reconstruction, `[N, 3, 64, 64]`; the images."""
    model, _ = load_model(run, "last")
    test = load_celeba(Path(str(run.config.data_root))).with_attributes(SHOWN).test
    pictures = toggle_attributes(model, unit(test.images))
    off = 2 * SHOWN.index(name)
    return pictures[:, off + 1] - pictures[:, off], test


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_an_attribute_is_switched_on_and_off_where_it_is_and_hardly_elsewhere(run: Run, name: str) -> None:
    change, test = _switched(run, name)
    first, last, left, right = WHERE[name]
    there = torch.zeros(64, 64, dtype=torch.bool)
    there[first:last, left:right] = True
    inside, outside = (float(change.abs().mean((0, 1))[mask].mean()) for mask in (there, ~there))
    assert inside > 0.04 and inside > 5 * outside, (inside, outside)
    images, on = unit(test.images), test.labels[:, SHOWN.index(name)] == 1
    real = images[on].mean(0) - images[~on].mean(0)
    ours, theirs = change.mean(0)[:, there].flatten(), real[:, there].flatten()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.7, "what appears is what such images have there"
    assert (ours @ theirs) / (theirs @ theirs) > 0.5, "and as much of it"


@pytest.mark.slow
def test_the_commands_say_how_well_each_attribute_is_known_and_draw_the_grid(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = run.summary()["best"]["test_accuracy_Smiling"]
    assert run_dgrad("evaluate", run.path, "--eval-samples", 1) == 0
    assert f"Smiling {100 * accuracy:.1f}" in capsys.readouterr().out
    assert run_dgrad("evaluate", run.path, "--eval-samples", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy_Smiling"] == accuracy
    assert run_dgrad("sample", run.path, "--grid", "--rows", 2, "--out", "grid.png") == 0
    with Image.open("grid.png") as picture:
        assert picture.size == (6 * 68 + 4 + 2 * 12, 16 + 2 * 68 + 4)
    assert run_dgrad("reconstruct", run.path, "--grid", "--rows", 3, "--out", "switched.png") == 0
    with Image.open("switched.png") as picture:
        assert picture.size == (6 * 68 + 4 + 2 * 12, 16 + 3 * 68 + 4)
    assert run_dgrad("reconstruct", run.path, "--grid", "--columns", 3, "--out", "no.png") == 2
    assert "--grid has two columns for each attribute" in capsys.readouterr().err


@pytest.mark.slow
def test_an_npz_takes_the_same_path(capsys: pytest.CaptureFixture[str]) -> None:
    path = _npz(attributes=_attributes(), attribute_names=np.array(["a", "b", "c"]))
    options = [
        "--model",
        "conv",
        "--hidden",
        "4,4",
        "--gaussian",
        2,
        "--latent",
        "3x2",
        "--labels",
        20,
        "--binarize",
        "none",
    ]
    assert run_dgrad("train", "--dataset", path, *options, "--epochs", 1, "--device", "cpu", "--out", "run") == 0
    assert ", accuracy " in capsys.readouterr().out
    assert Run.open(Path("run")).config.attributes == ("a", "b", "c"), "those there are"
    dataset = load_dataset(str(path), None, {})
    model, _ = load_model(Run.open(Path("run")))
    figures = evaluate_accuracies(model, dataset.test, ("a", "b", "c"))
    assert json.loads(Path("run/summary.json").read_text())["accuracy"] == pytest.approx(figures["accuracy"])
