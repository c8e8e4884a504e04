"""The data sets: what they hold, how they are read, and that whatever is wrong with a file is said in one line."""

from __future__ import annotations

import ast
import gzip
import io
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

import dgrad.data
from dgrad.data import (
    Batches,
    Dataset,
    Split,
    binarize,
    default_data_root,
    download_idx,
    load_dataset,
    load_folder,
    load_idx,
    load_npz,
    partition,
    unit,
)
from dgrad.data.idx import IDX_FILES
from dgrad.errors import InputError, RunError
from dgrad_plugins.datasets import DATASETS

CLASSES = tuple("0123456789")


def error_of(call: Callable[[], object], kind: type[Exception] = InputError) -> str:
    """The message of the error that the call ends in: one line."""
    with pytest.raises(kind, match=r"\A[^\n]+\Z") as caught:
        call()
    return str(caught.value)


def toy(count: int = 30, *, dtype: torch.dtype = torch.uint8, labels: bool = True) -> Split:
    images = torch.randint(0, 256, (count, 1, 3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Split(images if dtype == torch.uint8 else unit(images), torch.arange(count) % 3 if labels else None)


def toy_dataset(dtype: torch.dtype = torch.uint8) -> Dataset:
    return Dataset("toy", toy(20, dtype=dtype), toy(20, dtype=dtype), toy(4, dtype=dtype), ("a", "b", "c"))


def codes(images: torch.Tensor) -> list[int]:
    """Images made by `numbered`, told apart by their first two pixels."""
    first, second = images[:, 0, 0, 0].long(), images[:, 0, 0, 1].long()
    return (first * 256 + second).tolist()


def numbered(count: int) -> np.ndarray:  # [N, 3, 4]
    images = np.zeros((count, 3, 4), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    images[:, 1] = 255
    return images


def assert_partition(dataset: Dataset, count: int) -> None:
    images = torch.cat([split.images for split in (dataset.train, dataset.valid, dataset.test)])
    assert sorted(codes(images)) == list(range(count))


# --- the classes


def test_unit_is_where_uint8_meets_the_unit_interval() -> None:
    floats = torch.rand(3)
    assert unit(floats) is floats
    assert torch.equal(unit(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([0.0, 1.0]))


def test_a_dataset_knows_its_shape_and_moves() -> None:
    dataset = toy_dataset()
    assert dataset.image_shape == (1, 3, 4)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [20, 20, 4]
    moved = dataset.to("meta")
    assert moved.test.images.is_meta and moved.test.labels is not None and moved.test.labels.is_meta
    assert moved.name == "toy" and moved.classes == dataset.classes


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (torch.zeros(2, 3, 4), None, "[2, 3, 4] of float32; expected [N, C, H, W]"),
        (torch.zeros(2, 1, 3, 4, dtype=torch.float64), None, "float64"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(3, dtype=torch.int64), "[3] of int64; expected [2] of int64"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2), "[2] of float32; expected [2] of int64"),
    ],
)
def test_a_split_rejects_other_tensors(images: torch.Tensor, labels: torch.Tensor | None, expected: str) -> None:
    assert expected in error_of(lambda: Split(images, labels))


def test_a_dataset_rejects_splits_that_do_not_fit_together() -> None:
    empty = Split(torch.zeros(0, 1, 3, 4, dtype=torch.uint8))
    assert "[0, 1, 3, 4] of uint8" in error_of(lambda: Dataset("toy", toy(), toy(), empty))
    assert "float32" in error_of(lambda: Dataset("toy", toy(), toy(), toy(dtype=torch.float32)))


# --- splitting


def test_partition_is_stratified_complete_and_repeatable() -> None:
    count = 1000
    images = torch.from_numpy(numbered(count))[:, None]
    labels = (torch.arange(count) % 10 == 0).long() + 2 * (torch.arange(count) % 100 == 1).long()  # 890, 100, 10
    one, again, other = (partition("toy", images, labels, None, seed=seed) for seed in (0, 0, 1))
    assert_partition(one, count)
    assert [len(s) for s in (one.train, one.valid, one.test)] == [800, 100, 100]
    for split in (one.valid, one.test):
        assert split.labels is not None
        assert torch.bincount(split.labels).tolist() == pytest.approx([89, 10, 1], abs=1)
    assert codes(one.test.images) == codes(again.test.images) != codes(other.test.images)
    assert_partition(partition("toy", images, None, None, valid=7, test=11), count)


# --- binarisation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mode", ["threshold", "static"])
def test_binarisation_gives_black_and_white_and_is_repeatable(mode: str, dtype: torch.dtype) -> None:
    first, again = (binarize(toy_dataset(dtype), mode, seed=3) for _ in range(2))
    for name in ("train", "valid", "test"):
        images = getattr(first, name).images
        assert images.dtype == torch.uint8
        assert set(images.flatten().tolist()) == {0, 255}
        assert torch.equal(images, getattr(again, name).images)
        assert torch.equal(getattr(first, name).labels, getattr(toy_dataset(), name).labels)


def test_threshold_is_at_one_half() -> None:
    grey = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    for images in (grey, unit(grey), torch.tensor([0.0, 0.4999, 0.5, 1.0]).reshape(1, 1, 2, 2)):
        split = Split(images)
        binary = binarize(Dataset("toy", split, split, split), "threshold", seed=0).train.images
        assert binary.flatten().tolist() == [0, 0, 255, 255]


def test_static_draws_follow_the_pixels_the_seed_and_the_split() -> None:
    split = Split(torch.tensor([0.0, 0.3, 1.0]).reshape(1, 1, 1, 3).repeat(5000, 1, 1, 1))
    dataset = Dataset("toy", split, split, split)
    one, other = (binarize(dataset, "static", seed=seed) for seed in (0, 1))
    mean = unit(one.train.images).mean((0, 1, 2))
    assert mean[0] == 0 and mean[2] == 1
    assert mean[1].item() == pytest.approx(0.3, abs=5 * (0.21 / 5000) ** 0.5)
    assert not torch.equal(one.train.images, other.train.images)
    assert not torch.equal(one.train.images, one.valid.images)


def test_dynamic_and_none_leave_the_data_alone() -> None:
    dataset = toy_dataset()
    assert binarize(dataset, "dynamic", seed=0) is dataset and binarize(dataset, "none", seed=0) is dataset
    assert "did you mean 'static'" in error_of(lambda: binarize(dataset, "statik", seed=0))


# --- batches


def batches(seed: int = 0, **options: Any) -> Batches:
    return Batches(toy(), 8, generator=torch.Generator().manual_seed(seed), **options)


def test_an_epoch_shows_every_image_once_in_a_new_order() -> None:
    stream, split = batches(), toy()
    assert stream.steps_per_epoch == 4
    epochs = []
    for _ in range(2):
        epoch = [next(stream) for _ in range(4)]
        assert [len(batch.images) for batch in epoch] == [8, 8, 8, 6]
        for batch in epoch:
            assert batch.images.dtype == torch.float32
            assert torch.equal(batch.images, unit(split.images)[batch.index])
            assert batch.labels is not None and split.labels is not None
            assert torch.equal(batch.labels, split.labels[batch.index])
        epochs.append(torch.cat([batch.index for batch in epoch]).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30))
    assert epochs[0] != epochs[1]


def test_short_batches_can_be_dropped_and_labels_can_be_missing() -> None:
    stream = Batches(toy(labels=False), 8, generator=torch.Generator(), drop_last=True)
    assert stream.steps_per_epoch == 3
    assert {len(next(stream).images) for _ in range(7)} == {8}
    assert next(stream).labels is None


def test_dynamic_batches_are_drawn_anew() -> None:
    stream = Batches(Split(torch.full((400, 1, 3, 4), 0.3)), 400, generator=torch.Generator(), dynamic=True)
    one, other = next(stream).images, next(stream).images
    assert set(one.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(one, other)
    assert one.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 4800) ** 0.5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 6])
def test_a_restored_stream_goes_on_bit_for_bit(steps: int, dynamic: bool) -> None:
    stream = batches(dynamic=dynamic)
    for _ in range(steps):
        next(stream)
    state = {key: value.clone() for key, value in stream.state_dict().items()}
    restored = batches(seed=99, dynamic=dynamic)
    next(restored)
    restored.load_state_dict(state)
    for _ in range(10):
        expected, got = next(stream), next(restored)
        assert torch.equal(expected.index, got.index) and torch.equal(expected.images, got.images)
    for key, value in stream.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key])


def test_a_stream_with_another_layout_is_not_restored() -> None:
    state = batches().state_dict()
    other = Batches(toy(), 7, generator=torch.Generator())
    message = error_of(lambda: other.load_state_dict(state))
    assert "(30, 8, 4); expected (30, 7, 5)" in message and "resume with" in message
    state["generator"] = torch.zeros(16, dtype=torch.uint8)
    assert "another kind of device" in error_of(lambda: batches().load_state_dict(state))


def test_batches_reject_sizes_and_generators_that_cannot_be() -> None:
    generator = torch.Generator()
    assert "batch size 0; expected 1" in error_of(lambda: Batches(toy(), 0, generator=generator))
    assert "no batch of 31 in a split of 30" in error_of(
        lambda: Batches(toy(), 31, generator=generator, drop_last=True)
    )
    assert "on cpu for data on meta" in error_of(lambda: Batches(toy().to("meta"), 8, generator=generator))


def test_the_global_generator_does_not_move() -> None:
    before = torch.get_rng_state()
    next(batches(dynamic=True))
    binarize(toy_dataset(), "static", seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_no_step_asks_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object) -> None:
        raise AssertionError("a step waits for the device")

    stream = batches(dynamic=True)
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    for _ in range(9):
        next(stream)


@pytest.mark.gpu
def test_no_step_waits_for_a_cuda_device() -> None:
    stream = Batches(toy().to("cuda"), 8, generator=torch.Generator("cuda").manual_seed(0), dynamic=True)
    next(stream)
    state = stream.state_dict()
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = [next(stream) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.load_state_dict(state)
    for expected in after:
        assert torch.equal(next(stream).images, expected.images)


# --- IDX files


def idx(values: np.ndarray, dtype: int = 8) -> bytes:
    return bytes([0, 0, dtype, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def idx_contents(train: int = 60, test: int = 12) -> dict[str, bytes]:
    arrays = (numbered(train), np.arange(train) % 10, numbered(test), np.arange(test) % 10)
    return {name: idx(array.astype(np.uint8)) for name, array in zip(IDX_FILES, arrays, strict=True)}


def write_idx(folder: Path, **changes: bytes | None) -> Path:
    """The four files; `changes` replace one, named by the beginning of its name with _ for -, or leave it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_contents().items():
        change = changes.get("_".join(name.split("-")[:2]), content)
        if change is not None:
            (folder / name).write_bytes(change)
    return folder


def test_idx_files_plain_and_gzipped_are_the_same(tmp_path: Path) -> None:
    write_idx(tmp_path / "plain")
    (tmp_path / "zipped").mkdir()
    for name, content in idx_contents().items():
        (tmp_path / "zipped" / f"{name}.gz").write_bytes(gzip.compress(content))
    plain, zipped = (load_idx("toy", tmp_path / name, CLASSES) for name in ("plain", "zipped"))
    assert plain.image_shape == (1, 3, 4) and plain.train.images.dtype == torch.uint8
    assert codes(plain.train.images) == list(range(50))
    assert codes(plain.valid.images) == list(range(50, 60))  # the last sixth
    assert codes(plain.test.images) == list(range(12))
    for name in ("train", "valid", "test"):
        one, other = getattr(plain, name), getattr(zipped, name)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.labels, torch.tensor(codes(one.images)) % 10)


def test_a_large_training_file_gives_its_last_10000_images(tmp_path: Path) -> None:
    count = 20_001
    write_idx(tmp_path, train_images=idx(numbered(count)), train_labels=idx(np.zeros(count, np.uint8)))
    dataset = load_idx("toy", tmp_path, CLASSES)
    assert (len(dataset.train), len(dataset.valid)) == (10_001, 10_000)


GOOD = idx_contents()
GOOD_IMAGES, GOOD_LABELS = GOOD[IDX_FILES[0]], GOOD[IDX_FILES[1]]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("train-images", GOOD_IMAGES[:-1], "735 bytes; expected 736 for the dimensions [60, 3, 4]"),
        ("train-images", GOOD_IMAGES + b"x", "737 bytes; expected 736 for the dimensions [60, 3, 4]"),
        ("train-images", GOOD_IMAGES[:9], "9 bytes; expected a header of 16"),
        ("train-images", b"", "begins with bytes ''; expected '00 00 08 03'"),
        ("train-images", GOOD_LABELS, "begins with bytes '00 00 08 01'; expected '00 00 08 03'"),
        ("train-images", idx(numbered(60), dtype=13), "begins with bytes '00 00 0d 03'; expected '00 00 08 03'"),
        ("train-images", b"<html>", "begins with bytes '3c 68 74 6d'"),
        ("train-images", idx(numbered(0)), "dimensions [0, 3, 4]: it is empty"),
        ("train-images", idx(numbered(59)), "59 images and train-labels-idx1-ubyte 60 labels"),
        ("train-labels", idx(np.zeros(0, np.uint8)), "dimensions [0]: it is empty"),
        ("train-labels", idx(np.full(60, 10, np.uint8)), "has the label 10; expected 0 to 9"),
        ("t10k-images", idx(np.zeros((12, 4, 4), np.uint8)), "images of 4x4; expected 3x4"),
        ("t10k-labels", GOOD_LABELS, "12 images and t10k-labels-idx1-ubyte 60 labels"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_a_bad_idx_file_is_named(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    write_idx(tmp_path, **{file.replace("-", "_"): content})
    message = error_of(lambda: load_idx("toy", tmp_path, CLASSES))
    assert expected in message
    assert str(tmp_path) in message and file in message and "fetch" in message


@pytest.mark.parametrize(
    "content",
    [gzip.compress(GOOD_IMAGES)[:-20], b"nothing of the kind", gzip.compress(GOOD_IMAGES)[:30] + b"\0" * 30],
    ids=["truncated", "not gzip", "damaged"],  # gzip writes the time of day into its header: no name for a test
)
def test_a_corrupt_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_idx(tmp_path, train_images=None)
    (tmp_path / f"{IDX_FILES[0]}.gz").write_bytes(content)
    message = error_of(lambda: load_idx("toy", tmp_path, CLASSES))
    assert f"{IDX_FILES[0]}.gz is corrupt" in message and "expected a whole gzip file; delete it" in message


def test_one_training_image_is_too_few(tmp_path: Path) -> None:
    write_idx(tmp_path, train_images=idx(numbered(1)), train_labels=idx(np.zeros(1, np.uint8)))
    assert "has 1 image; expected at least 2" in error_of(lambda: load_idx("toy", tmp_path, CLASSES))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_a_missing_file_among_the_four_is_named(tmp_path: Path, name: str) -> None:
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[name]
    raw = write_idx(tmp_path / folder / "raw", t10k_labels=None)
    assert f"{raw} has no t10k-labels-idx1-ubyte; expected" in error_of(lambda: DATASETS[name](tmp_path))
    write_idx(raw)
    dataset = DATASETS[name](tmp_path)
    assert dataset.name == name and dataset.classes is not None and len(dataset.classes) == 10


# --- downloads, without a network


@pytest.fixture
def torchvision_mnist(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Path], None]], None]]:
    import torchvision

    def install(write: Callable[[Path], None]) -> None:
        def fake(root: str, download: bool) -> None:
            print("Downloading ...")
            print("100%", file=sys.stderr)
            assert download
            raw = Path(root, "MNIST", "raw")
            raw.mkdir(parents=True)
            write(raw)

        monkeypatch.setattr(torchvision.datasets, "MNIST", fake)

    yield install


def whole_download(raw: Path) -> None:
    write_idx(raw)
    for name, content in idx_contents().items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content))


@pytest.mark.parametrize("folder_exists", [False, True])
def test_a_download_is_moved_into_place_in_silence(
    tmp_path: Path, torchvision_mnist: Any, capsys: pytest.CaptureFixture[str], folder_exists: bool
) -> None:
    torchvision_mnist(whole_download)
    root = tmp_path / "new"
    if folder_exists:
        (root / "MNIST" / "raw").mkdir(parents=True)
        (root / "MNIST" / "raw" / "notes.txt").touch()
    assert len(DATASETS["mnist"](root).train) == 50
    assert [entry.name for entry in root.iterdir()] == ["MNIST"]
    assert {entry.name for entry in (root / "MNIST" / "raw").iterdir()} - {"notes.txt"} == set(IDX_FILES)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("Error:\nTried twice"), TimeoutError()])
def test_a_failed_download_leaves_nothing(tmp_path: Path, torchvision_mnist: Any, error: Exception) -> None:
    def half(raw: Path) -> None:
        (raw / IDX_FILES[0]).write_bytes(b"half")
        raise error

    torchvision_mnist(half)
    message = error_of(lambda: DATASETS["mnist"](tmp_path), RunError)
    assert f"MNIST could not be downloaded into {tmp_path / 'MNIST' / 'raw'}" in message
    for remedy in (*IDX_FILES, "--data-root", "--dataset digits"):
        assert remedy in message
    assert not list(tmp_path.iterdir())


def test_a_data_root_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "could not be downloaded" in error_of(lambda: download_idx("MNIST", tmp_path / "file"), RunError)


def test_files_that_are_there_are_not_downloaded(tmp_path: Path, torchvision_mnist: Any) -> None:
    torchvision_mnist(lambda raw: pytest.fail("downloaded"))
    raw = write_idx(tmp_path / "MNIST" / "raw")
    assert download_idx("MNIST", tmp_path) == raw


# --- digits


def test_digits_are_bundled_and_split_evenly(tmp_path: Path) -> None:
    dataset = DATASETS["digits"](tmp_path / "nowhere")
    assert dataset.image_shape == (1, 8, 8)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [1297, 250, 250]
    assert dataset.train.images.dtype == torch.float32
    assert dataset.train.images.min() == 0 and dataset.train.images.max() == 1
    assert dataset.test.labels is not None
    assert torch.bincount(dataset.test.labels).tolist() == pytest.approx([25] * 10, abs=1)
    again = DATASETS["digits"](tmp_path)
    assert torch.equal(dataset.test.images, again.test.images)


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    dataset, bunch = DATASETS["digits"](tmp_path), load_digits()
    ours = torch.cat([split.images for split in (dataset.train, dataset.valid, dataset.test)]).flatten(1) * 16
    theirs = torch.from_numpy(bunch.data).float()
    assert ours.unique(dim=0).equal(theirs.unique(dim=0))
    assert dataset.test.labels is not None
    first = (theirs == dataset.test.images[0].flatten() * 16).all(1)
    assert int(bunch.target[first.numpy()][0]) == int(dataset.test.labels[0])


def test_every_factory_describes_itself() -> None:
    for factory in DATASETS.values():
        assert factory.__doc__ and "\n" not in factory.__doc__


# --- .npz files


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "toy.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 5, 6), (1, 5, 6)),
        ((20, 5, 6, 1), (1, 5, 6)),
        ((20, 5, 6, 3), (3, 5, 6)),
        ((20, 3, 5, 6), (3, 5, 6)),
        ((20, 3, 6, 3), (3, 6, 3)),  # ambiguous: channels first
    ],
)
def test_npz_images_of_every_layout(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    dataset = load_npz(npz(tmp_path, images=images))
    assert dataset.image_shape == expected and dataset.name == "toy.npz" and dataset.classes is None
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [16, 2, 2]
    if shape[-1] == 3 and expected[-1] != 3:
        whole = {image.tobytes() for image in images}
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in dataset.train.images} < whole


def test_npz_keeps_labels_with_their_images(tmp_path: Path) -> None:
    labels = (np.arange(100) % 4).astype(np.uint16)
    dataset = load_npz(npz(tmp_path, images=numbered(100), labels=labels))
    assert_partition(dataset, 100)
    assert dataset.classes == ("0", "1", "2", "3")
    for split in (dataset.train, dataset.valid, dataset.test):
        assert split.labels is not None
        assert split.labels.tolist() == [code % 4 for code in codes(split.images)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_floats_become_float32_in_range(tmp_path: Path, dtype: type) -> None:
    images: np.ndarray = np.linspace(0, 1, 240).reshape(20, 3, 4).astype(dtype)
    if dtype == np.float64:
        images[-1] += 1e-9
    train = load_npz(npz(tmp_path, images=images)).train
    assert train.images.dtype == torch.float32 and train.images.max() <= 1


def test_npz_with_splits_of_its_own(tmp_path: Path) -> None:
    images = numbered(30)
    parts = {"train_images": images[:20], "valid_images": images[20:25], "test_images": images[25:]}
    labels = {"train_labels": np.arange(20) % 3, "valid_labels": np.arange(5) % 2, "test_labels": np.zeros(5, int)}
    dataset = load_npz(npz(tmp_path, **parts, **labels, notes=np.array([None])))
    assert codes(dataset.valid.images) == [20, 21, 22, 23, 24] and dataset.classes == ("0", "1", "2")
    assert load_npz(npz(tmp_path, **parts)).test.labels is None

    wrong = {**parts, "test_images": parts["test_images"][:, :2]}
    message = error_of(lambda: load_npz(npz(tmp_path, **wrong)))
    assert "'toy.npz'" in message and "[5, 1, 2, 4]" in message
    del wrong["test_images"]
    assert "toy.npz has no test_images (it has: train_images, valid_images)" in error_of(
        lambda: load_npz(npz(tmp_path, **wrong))
    )
    del labels["test_labels"]
    assert "labels for 2 of its 3 splits; expected all or none" in error_of(
        lambda: load_npz(npz(tmp_path, **parts, **labels))
    )
    assert "expected one of the two" in error_of(lambda: load_npz(npz(tmp_path, images=images, **parts)))


ZEROS = np.zeros((20, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"pictures": ZEROS, "y": ZEROS}, "has no images (it has: pictures, y); expected images"),
        ({}, "(it has: nothing)"),
        ({"images": np.array([None] * 20)}, "images cannot be read (Object arrays"),
        ({"images": ZEROS, "labels": np.array([{}] * 20)}, "labels cannot be read (Object arrays"),
        ({"images": ZEROS[0]}, "images have the shape [3, 4]; expected [N, H, W]"),
        ({"images": ZEROS[:, :0]}, "images have the shape [20, 0, 4]"),
        ({"images": np.zeros((20, 5, 5, 4), np.uint8)}, "[20, 5, 5, 4]; expected [N, H, W]"),
        ({"images": ZEROS + 2}, "images hold values from 2 to 2; expected floats in [0, 1]; rescale"),
        ({"images": ZEROS - 0.5}, "from -0.5 to -0.5"),
        ({"images": ZEROS * np.nan}, "hold NaN or infinite values; expected floats in [0, 1]"),
        ({"images": ZEROS.astype(np.int64)}, "images are int64; expected uint8 (0..255) or floats in [0, 1]"),
        ({"images": np.ones((20, 3, 4), np.uint8)}, "uint8 with a maximum of 1; expected 255 for white; multiply"),
        ({"images": ZEROS[:9]}, "has 9 images; expected at least 10"),
        ({"images": ZEROS, "labels": np.zeros(19, int)}, "labels have the shape [19]; expected [20]"),
        ({"images": ZEROS, "labels": np.zeros(20)}, "labels are float64; expected integers"),
        ({"images": ZEROS, "labels": np.full(20, -1)}, "labels hold -1; expected 0 or more"),
        ({"images": ZEROS, "labels": np.full(20, 1999)}, "the label 1999 among 20 images"),
    ],
)
def test_a_bad_npz_file_is_named(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    path = npz(tmp_path, **arrays)
    message = error_of(lambda: load_npz(path))
    assert message.startswith(str(path)) and expected in message


def test_what_is_no_npz_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "toy.npz"
    assert f"there is no file {path}" in error_of(lambda: load_npz(path))
    whole = npz(tmp_path, images=numbered(200)).read_bytes()
    for content in (b"", b"not a zip", whole[:-100]):
        path.write_bytes(content)
        assert f"{path} is not a .npz file" in error_of(lambda: load_npz(path))
    broken = bytearray(whole)
    broken[1000] ^= 1
    path.write_bytes(broken)
    assert "images cannot be read (Bad CRC-32" in error_of(lambda: load_npz(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "no array")
    assert "toy.npz: images are" in error_of(lambda: load_npz(path))


# --- folders of images


def image_folder(root: Path, make: Callable[[int], Any], count: int = 12, suffix: str = "png") -> Path:
    for number in range(count):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        make(number).save(folder / f"{number:02}.{suffix}")
    return root


def picture(mode: str, size: tuple[int, int] = (4, 3)) -> Callable[[int], Any]:
    from PIL import Image

    def make(number: int) -> Any:
        if mode == "I;16":
            return Image.fromarray(np.full(size[::-1], number * 256 + 255, np.uint16))
        colour: dict[str, Any] = {
            "RGB": (number, 0, 9),
            "RGBA": (number, 0, 9, 255),
            "LA": (number, 255),
            "1": number % 2,
        }
        return Image.new(mode, size, colour.get(mode, number))

    return make


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("L", "png", 1),
        ("L", "jpg", 1),
        ("LA", "png", 1),
        ("1", "png", 1),
        ("I;16", "png", 1),
        ("RGB", "png", 3),
        ("RGB", "bmp", 3),
        ("RGBA", "png", 3),
        ("CMYK", "jpg", 3),
    ],
)
def test_a_folder_of_images_of_every_mode(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    dataset = load_folder(image_folder(tmp_path / "pets", picture(mode), count=20, suffix=suffix))
    assert dataset.image_shape == (channels, 3, 4) and dataset.classes == ("cats", "dogs") and dataset.name == "pets"
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [16, 2, 2]
    assert dataset.valid.labels is not None and sorted(dataset.valid.labels.tolist()) == [0, 1]
    assert dataset.train.images.dtype == torch.uint8
    if suffix != "jpg" and mode != "1":
        pixels = torch.cat([split.images[:, 0, 0, 0] for split in (dataset.train, dataset.valid, dataset.test)])
        assert sorted(pixels.tolist()) == list(range(20))


def test_palettes_are_looked_up_and_grey_colours_become_grey(tmp_path: Path) -> None:
    from PIL import Image

    def palette(*colour: int) -> Callable[[int], Any]:
        return lambda number: Image.new("RGB", (4, 3), colour).convert("P", palette=Image.Palette.ADAPTIVE)

    red = load_folder(image_folder(tmp_path / "red", palette(200, 0, 0)))
    assert red.train.images[0, :, 0, 0].tolist() == [200, 0, 0]
    grey = load_folder(image_folder(tmp_path / "grey", palette(70, 70, 70)))
    assert grey.image_shape == (1, 3, 4) and grey.train.images[0, 0, 0, 0] == 70


def test_transparency_is_laid_over_black(tmp_path: Path) -> None:
    from PIL import Image

    for mode, clear in (("RGBA", (200, 100, 50, 0)), ("LA", (200, 0))):
        dataset = load_folder(image_folder(tmp_path / mode, lambda _, m=mode, c=clear: Image.new(m, (4, 3), c)))  # type: ignore[misc]
        assert dataset.train.images.max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = load_folder(image_folder(tmp_path / "half", lambda _: Image.new("RGBA", (4, 3), (200, 100, 50, 128))))
    assert half.train.images[0, :, 0, 0].tolist() == pytest.approx([100, 50, 25], abs=1)


def test_images_that_differ_are_named(tmp_path: Path) -> None:
    sizes = image_folder(tmp_path / "sizes", picture("L"))
    picture("L", (5, 3))(0).save(sizes / "cats" / "05.png")
    message = error_of(lambda: load_folder(sizes))
    assert f"{sizes / 'cats' / '01.png'} is 4x3 grey, {sizes / 'cats' / '05.png'} is 5x3 grey" in message
    assert "resize" in message
    modes = image_folder(tmp_path / "modes", picture("L"))
    picture("RGB")(0).save(modes / "dogs" / "04.png")
    assert "04.png is 4x3 colour; expected one size, all grey or all colour" in error_of(lambda: load_folder(modes))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "pets", picture("RGB", (40, 30)))
    victim = root / "cats" / "03.png"
    buffer = io.BytesIO()
    picture("RGB", (40, 30))(3).save(buffer, "png")
    for content in (b"", b"not an image", buffer.getvalue()[:70]):
        victim.write_bytes(content)
        message = error_of(lambda: load_folder(root))
        assert message.startswith(f"{victim} cannot be read as an image") and "replace or delete it" in message


def test_a_folder_without_classes_or_images_is_an_error(tmp_path: Path) -> None:
    assert "there is no folder" in error_of(lambda: load_folder(tmp_path / "nowhere"))
    pets = tmp_path / "pets"
    pets.mkdir()
    assert f"{pets} has no class folders; expected <folder>/<class>/<image>" in error_of(lambda: load_folder(pets))
    (pets / "cats").mkdir()
    assert f"{pets / 'cats'} has no images" in error_of(lambda: load_folder(pets))
    (pets / "cats").rmdir()
    image_folder(pets, picture("L"), count=9)
    assert "has 9 images; expected at least 10" in error_of(lambda: load_folder(pets))
    (tmp_path / "splits" / "train").mkdir(parents=True)
    assert "has the folders train, which are splits" in error_of(lambda: load_folder(tmp_path / "splits"))


# --- finding one


def test_a_dataset_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[Path] = []

    def toy_factory(root: Path) -> Dataset:
        roots.append(root)
        return toy_dataset()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DGRAD_DATA", str(tmp_path / "env"))
    registered = {"toy": toy_factory, "toys": toy_factory}
    assert load_dataset("toy", tmp_path, registered).name == "toy"
    assert load_dataset("toy", None, registered).name == "toy"
    assert roots == [tmp_path, tmp_path / "env"]

    path = npz(tmp_path, images=numbered(10))
    assert load_dataset(str(path), None, registered).name == load_dataset("toy.npz", None, {}).name == "toy.npz"
    image_folder(tmp_path / "toys", picture("L"))
    assert load_dataset("toys", None, registered).name == "toy"
    assert load_dataset("./toys", None, registered).name == load_dataset("toys", None, {}).name == "toys"


def test_what_is_neither_a_name_nor_a_path_is_an_error(tmp_path: Path) -> None:
    message = error_of(lambda: load_dataset("digit", tmp_path, DATASETS))
    assert "unknown dataset 'digit'; did you mean 'digits'?" in message and ".npz file" in message
    assert "unknown dataset ''" in error_of(lambda: load_dataset("", tmp_path, DATASETS))
    for spec in ("gone.npz", str(tmp_path / "gone")):
        assert f"there is no {spec}; expected a .npz file or a folder" in error_of(
            lambda spec=spec: load_dataset(spec, tmp_path, DATASETS)  # type: ignore[misc]
        )


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG folders are those of Unix")
def test_the_default_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("DGRAD_DATA", "")
    assert default_data_root() == tmp_path / ".cache" / "dgrad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_data_root() == tmp_path / "xdg" / "dgrad"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_data_root() == tmp_path / ".cache" / "dgrad"
    monkeypatch.setenv("DGRAD_DATA", "~/data")
    assert default_data_root() == tmp_path / "data"


@pytest.mark.parametrize("file", sorted(Path(dgrad.data.__file__).parent.glob("*.py")), ids=lambda file: file.name)
def test_importing_the_core_loads_only_torch_numpy_and_jaxtyping(file: Path) -> None:
    imported: set[str] = set()
    for node in ast.parse(file.read_text()).body:  # the module's top level
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    allowed = {"torch", "numpy", "jaxtyping", *sys.stdlib_module_names}
    for name in imported:
        ours = name in ("dgrad.errors", "dgrad.files.images") or name.startswith("dgrad.data.")
        assert name.split(".")[0] in allowed or ours, name
