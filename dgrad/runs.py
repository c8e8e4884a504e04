"""A run directory: what is in it, and reading a trained model back. May import torch, models and data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from dgrad import registry
from dgrad.config import TrainConfig, option, read_config
from dgrad.data import Dataset, binarize, dataset_loader, default_data_root
from dgrad.errors import InputError
from dgrad.files import damaged, load_checkpoint, write_text
from dgrad.hyperparameters import hyperparameters_of
from dgrad.likelihoods import likelihood
from dgrad.networks import DiscreteVAE
from dgrad.writing import made_whole

SEEDS_FILE = "seeds.json"
"""What a directory of runs with several seeds has in the place of a run's configuration (`dgrad.seeds`)."""
SECONDS_FOR_ANOTHER = 20.0
"""How long a run's next process waits for the one before it, which saves its state."""
MODEL_OPTIONS = {"gaussian": "Gaussian variables", "dropout": "dropout"}
"""Settings that a model's factory takes if it has an argument of that name."""


class Run:
    """The directory of a training run.

    config.json             the resolved configuration, enough to repeat the run
    metrics.jsonl           a line for each evaluation
    summary.json            the figures of a finished run
    checkpoint.safetensors  the last state, the best weights by validation, and what it takes to go on
    *.png                   curves, samples, reconstructions
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.checkpoint_file = path / "checkpoint.safetensors"

    @classmethod
    def create(
        cls,
        path: Path,
        config: TrainConfig,
        *,
        overwrite: bool = False,
        first_save: Callable[[Run], None] | None = None,
    ) -> Run:
        """A new run directory with its configuration in it, whole or not at all; a run that it replaces goes last.

        Args:
            first_save: writes the first checkpoint (`Trainer.save`), before anything appears at `path`.

        Raises:
            InputError: the directory exists and is not empty; with `overwrite`, one that holds no run.
        """
        cls.check_free(path, overwrite=overwrite)
        with made_whole(path) as staging:
            run = cls(staging)
            write_text(run.config_file, config.to_json())
            if first_save is not None:
                first_save(run)
        return cls(path)

    @staticmethod
    def check_free(path: Path, *, overwrite: bool = False) -> None:
        """Make sure that a run can be created at `path`, before any work is done.

        Raises:
            InputError: it cannot.
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a directory for the run: choose another --out")
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise InputError(f"{path} cannot be made, because {nearest} is a file; choose another --out")
        if not path.exists() or not any(path.iterdir()):
            return
        if not overwrite:
            raise InputError(
                f"{path} exists already; choose another --out, continue it with --resume {path}, or replace it with --overwrite"
            )
        if not any((path / name).is_file() for name in ("config.json", SEEDS_FILE)):
            raise InputError(f"{path} holds files but no run, so --overwrite leaves it alone; choose another --out")

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            InputError: there is none.
        """
        run = cls(path)
        if (path / SEEDS_FILE).is_file():
            one = min(path.glob("seed*/"), default=path / "seed0")
            raise InputError(f"{path} holds runs of several seeds; expected one of them, such as {one}")
        if not run.config_file.is_file():
            found = "no such directory" if not path.exists() else "it has no config.json"
            raise InputError(f"no run at {path}: {found}; expected a directory that dgrad train wrote")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the run to oneself while it is trained. A process that is about to end, its state saved, is waited for.

        Raises:
            InputError: another process trains the run.
        """
        with self.config_file.open("rb") as file:
            deadline = time.monotonic() + SECONDS_FOR_ANOTHER
            while not _lock(file):
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{self.path} is being trained by another process; wait until that has ended, or stop it"
                    )
                time.sleep(0.1)
            yield

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return read_config(self.config_file)

    def metrics(self) -> list[dict[str, Any]]:
        """The evaluations so far, oldest first; a line that a killed process left unfinished is passed over."""
        if not self.metrics_file.is_file():
            return []
        lines = []
        for text in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = dict(json.loads(text))
                line["step"] + line["epoch"]
            except (ValueError, KeyError, TypeError):
                break
            lines.append(line)
        return lines

    def summary(self) -> dict[str, Any] | None:
        """The figures of a finished run, or None."""
        if not self.summary_file.is_file():
            return None
        try:
            summary = dict(json.loads(self.summary_file.read_text(encoding="utf-8")))
            summary["best"]["test_bound"] + summary["final"]["test_bound"]
            return summary
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.summary_file} is damaged; delete it and run dgrad train --resume {self.path}"
            ) from None

    def load_model(self, weights: str = "best") -> tuple[DiscreteVAE, dict[str, Any]]:
        """The trained model on the CPU, and the state (epoch, step ...) that its weights are from.

        Args:
            weights: `best` by the validation bound, or `last`.

        Raises:
            InputError: the checkpoint is missing, damaged, of another model, or from before the first evaluation.
        """
        config = self.config
        for plugin in config.plugins:
            registry.load_plugin(plugin)
        tensors, state = load_checkpoint(self.checkpoint_file)
        try:
            channels, height, width = map(int, state["image_shape"])
            source = state["best"] if weights == "best" else {"epoch": state["epoch"], "step": state["step"]}
            if source is None or source["step"] == 0:
                raise InputError(
                    f"{self.path} has no trained weights yet; continue it with dgrad train --resume {self.path}"
                )
            source = {"weights": weights, **source}
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise damaged(self.checkpoint_file, error) from None
        model = build_model(config, (channels, height, width))
        load_state(model, tensors, {"best": "best.", "last": "model."}[weights], self.checkpoint_file)
        model.eval()
        return model, source


def _lock(file: IO[bytes]) -> bool:
    """Lock an open file for this process, until it is closed; whether that went. Where there are no locks, all goes."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def load_state(module: Any, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Load the tensors whose names start with `prefix` into a module.

    Raises:
        InputError: names or shapes do not fit.
    """
    try:
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InputError(f"checkpoint {path} does not fit the model of its config.json: {detail}") from None


def build_model(config: TrainConfig, image_shape: tuple[int, int, int]) -> DiscreteVAE:
    """The untrained model that a configuration describes.

    Raises:
        InputError: the latent, the model or the likelihood is unknown, or they do not go together.
    """
    layer = registry.latent(config.latent)
    arguments = (layer, image_shape, likelihood(config.likelihood), config.hidden)
    chosen = {name: getattr(config, name) for name in MODEL_OPTIONS if getattr(config, name) is not None}
    known = hyperparameters_of(registry.registry().factory("models", config.model)) if chosen else {}
    for name, value in chosen.items():
        if name not in known:
            raise InputError(
                f"the model {config.model} has no {MODEL_OPTIONS[name]}; got {option(name)} {value}: leave it out, or take --model mixture{' or conv' if name == 'gaussian' else ''}"
            )
    return registry.build("models", config.model, DiscreteVAE, *arguments, **chosen)


def build_dataset(config: TrainConfig) -> Dataset:
    """The data set that a configuration describes, before binarisation.

    Raises:
        InputError: it is unknown or damaged.
        RunError: it could not be downloaded.
    """
    load = find_dataset(config)
    dataset: object = load(Path(config.data_root) if config.data_root else default_data_root())
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"the factory of dataset {config.dataset!r} made a {type(dataset).__name__}; expected a dgrad.data.Dataset: ask its "
            "plugin's author"
        )
    return dataset.with_attributes(config.attributes) if config.attributes else dataset


def find_dataset(config: TrainConfig) -> Callable[[Path], Dataset]:
    """What loads the data set that a configuration names; nothing is read or downloaded yet.

    Raises:
        InputError: it is unknown.
    """
    names = registry.datasets()
    if config.dataset not in names and registry.registry().claimed("datasets", config.dataset):
        registry.registry().factory("datasets", config.dataset)  # claimed twice: it raises, and says by whom
    return dataset_loader(config.dataset, names)


def evaluation_data(config: TrainConfig, dataset: Dataset) -> Dataset:
    """The data set as it is evaluated: binarised as in training, where `dynamic` draws once, from the run's seed."""
    return binarize(dataset, "static" if config.binarize == "dynamic" else config.binarize, seed=config.seed)


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with paths made absolute, so that a run can be resumed from another directory."""

    def absolute(text: str) -> str:
        return str(Path(text).resolve()) if Path(text).exists() else text

    return replace(
        config,
        dataset=config.dataset if config.dataset in registry.datasets() else absolute(config.dataset),
        data_root=None if config.data_root is None else str(Path(config.data_root).resolve()),
        plugins=tuple(absolute(plugin) for plugin in config.plugins),
    )
