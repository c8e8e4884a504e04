"""The configuration of a training run: every choice in one place, with its default. May import no torch.

The same names serve on the command line (`--batch-size`), in a TOML file (`batch-size = 100`) and in a run's `config.json`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dgrad.core.schedules import Schedule, schedule
from dgrad.errors import InputError, unknown_name

BINARIZATIONS = ("threshold", "static", "dynamic", "none")
KL_PLACES = ("outside", "inside")
LABEL_LOSSES = ("cross-entropy", "code")
CRITERIA = ("bound", "reconstruction", "accuracy")
COMPILE_MODES = ("auto", "on", "off")
SWEEP_PRECISIONS = ("float32", "bfloat16")
LEAST = {
    "epochs": 1, "batch_size": 1, "eval_every": 1, "eval_samples": 1, "seed": 0, "labels": 0, "labelled_batch": 0, "pretrain_steps": 0,
    "refine_steps": 0,
}  # fmt: skip
"""The least values of whole numbers."""


@dataclass(frozen=True)
class TrainConfig:
    """What `dgrad train` does. Values are checked when an instance is made.

    Attributes:
        estimator: the registered name of the gradient estimator.
        set: its hyper-parameters; schedules as text.
        latent: the latent's spec.
        dataset: a registered name, a `.npz` file or a folder of images by class.
        data_root: where data sets on disk are; None for `$DGRAD_DATA` or the user's cache folder.
        binarize: what becomes of grey pixels: rounded at 0.5, drawn once, drawn anew each time, or left grey.
        model: the registered name of the model.
        hidden: widths of its hidden layers, from the image to the code.
        gaussian: how many Gaussian variables it has beside the code; None for as many as suit the model.
        dropout: the share of its hidden units that a training step leaves out; None for what suits the model.
        input_dropout: the share of pixels that the encoder does not see in a training step.
        likelihood: bernoulli or squared-error.
        kl: where the KL is trained: outside (exact, beside the estimate) or inside the objective; None for what suits the estimator.
        kl_weight: its weight in training, a schedule as text; at 0 it is reported and not trained. That of Gaussian variables has weight 1.
        labels: how many training images show their label, balanced over the classes, or their attributes; 0 for training without labels.
        attributes: the data set's attributes that are labels, one for each variable of the code; with labels, none stands for all.
        labelled_batch: how many of these are drawn, with replacement, in each step, beside `batch_size` others; 0 only after pretraining.
        pretrain_steps: steps on labelled images alone, `batch_size` of them or all, drawn in the same way, before the run's own steps; with labels only.
        label_loss: what teaches the encoder the labels: the cross-entropy of its logits, or a loss of the code, which the estimator carries back.
        label_weight: of that loss.
        balance_weight: of `sum m log m/f`, m how frequent each class is in the code of unlabelled images, f how frequent it should be; with labels only.
        independence_weight: of the covariance between code and Gaussian variables, with labels only; None for 1000 with attributes, else 0.
        adversarial_weight: of the virtual adversarial loss (Miyato et al. 2018): how far q moves, in nats, within a small distance of an image; with labels only.
        adversarial_radius: that distance, the Euclidean norm of the change of the pixels.
        propagate_labels: the share of the training images that get a label, those for which the nearest neighbours' labels say it most clearly; 0 for none but their own.
        augment: whether labelled images are redrawn by small random affine maps.
        epochs: passes over the training images.
        steps: the number of steps instead, where it is not None.
        batch_size: images in a step.
        lr: Adam's learning rate, a schedule as text.
        weight_decay: decoupled weight decay (Loshchilov & Hutter 2019), not on biases.
        seed: of the initial weights, the order of the data, the noise and the evaluation.
        device: auto, cpu, cuda, cuda:1, mps ...
        compile: whether compiled kernels do the sweep where there are some: on, off, or auto, which compiles for a run that is long enough.
        sweep_precision: in which the sweep of a decoder with hidden layers, or of one of one's own, multiplies matrices: float32 or bfloat16.
        eval_every: epochs between two evaluations on the validation images.
        choose_by: what the best weights are best in, on the validation images: bound, reconstruction or accuracy; None for the
            accuracy with labels, else the bound.
        eval_samples: codes drawn for each image in the final evaluation.
        refine_steps: how many steps q is refined for each image of a training step (`dgrad.core.refinement.refine`); the decoder learns from codes of this
            q, the encoder as ever from its own. Not with labels.
        eval_refine_steps: the same in evaluation, where more of them cost less; None for as many.
        plugins: modules or `.py` files that are loaded first.
    """

    estimator: str = "direct"
    set: dict[str, str] = field(default_factory=dict)
    latent: str = "20x10"
    dataset: str = "digits"
    data_root: str | None = None
    binarize: str = "threshold"
    model: str = "linear"
    hidden: tuple[int, ...] = ()
    gaussian: int | None = None
    dropout: float | None = None
    input_dropout: float = 0.0
    likelihood: str = "bernoulli"
    kl: str | None = None
    kl_weight: str = "1"
    labels: int = 0
    attributes: tuple[str, ...] = ()
    labelled_batch: int = 50
    pretrain_steps: int = 0
    label_loss: str = "cross-entropy"
    label_weight: float = 50.0
    balance_weight: float = 30.0
    independence_weight: float | None = None
    adversarial_weight: float = 0.0
    adversarial_radius: float = 2.0
    propagate_labels: float = 0.0
    augment: bool = False
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 100
    lr: str = "cosine:0.01:0"
    weight_decay: float = 0.0
    seed: int = 0
    device: str = "auto"
    compile: str = "auto"
    sweep_precision: str = "float32"
    eval_every: int = 1
    choose_by: str | None = None
    eval_samples: int = 10
    refine_steps: int = 0
    eval_refine_steps: int | None = None
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            _check(name, getattr(self, name) >= least, getattr(self, name), f"a whole number of at least {least}")
            _check(name, getattr(self, name) < 2**62, getattr(self, name), "a number below 2**62")
        for name in ("estimator", "latent", "dataset", "model"):
            _check(name, bool(getattr(self, name).strip()), repr(getattr(self, name)), "a name")
        _check("steps", self.steps is None or self.steps >= 1, self.steps, "a whole number of at least 1")
        steps = self.eval_refine_steps
        _check("eval_refine_steps", steps is None or 0 <= steps < 2**62, steps, "a whole number of at least 0")
        _check(
            "refine_steps", not self.refine_steps or not self.labels, "it with --labels", "0, or given without --labels"
        )
        _check("gaussian", self.gaussian is None or self.gaussian >= 1, self.gaussian, "a whole number of at least 1")
        _check(
            "dropout",
            self.dropout is None or 0 <= self.dropout < 1,
            self.dropout,
            "a share of at least 0 and below 1",
        )
        _check("input_dropout", 0 <= self.input_dropout < 1, self.input_dropout, "a share of at least 0 and below 1")
        for name in ("label_weight", "balance_weight", "adversarial_weight", "weight_decay"):
            _check(name, 0 <= getattr(self, name) < math.inf, getattr(self, name), "a finite number of at least 0")
        _check("binarize", self.binarize in BINARIZATIONS, self.binarize, f"one of {', '.join(BINARIZATIONS)}")
        _check("kl", self.kl is None or self.kl in KL_PLACES, self.kl, f"one of {', '.join(KL_PLACES)}")
        _check("label_loss", self.label_loss in LABEL_LOSSES, self.label_loss, f"one of {', '.join(LABEL_LOSSES)}")
        _check(
            "augment",
            not self.augment or self.labels > 0,
            "it without --labels",
            "given with --labels, whose images it redraws",
        )
        _check(
            "adversarial_weight",
            not self.adversarial_weight or self.labels > 0,
            "it without --labels",
            "given with --labels",
        )
        _check(
            "pretrain_steps", not self.pretrain_steps or self.labels > 0, "it without --labels", "given with --labels"
        )
        _check(
            "labelled_batch",
            self.labelled_batch > 0 or self.pretrain_steps > 0,
            0,
            "at least 1, or given with --pretrain-steps: something has to see the labels",
        )
        _check("choose_by", self.choose_by in (None, *CRITERIA), self.choose_by, f"one of {', '.join(CRITERIA)}")
        _check(
            "choose_by",
            self.choose_by != "accuracy" or self.labels > 0,
            "accuracy without --labels",
            "bound or reconstruction, or given with --labels",
        )
        share = self.propagate_labels
        _check("propagate_labels", 0 <= share <= 1, share, "a share of 0 to 1")
        _check("propagate_labels", not share or self.labels > 0, "it without --labels", "given with --labels")
        radius = self.adversarial_radius
        _check("adversarial_radius", 0 < radius < math.inf, radius, "a finite number above 0")
        weight = self.independence_weight
        _check("independence_weight", weight is None or 0 <= weight < math.inf, weight, "a finite number of at least 0")
        _check(
            "attributes",
            not self.attributes or self.labels > 0,
            "them without --labels",
            "given with --labels, the number of images that show them",
        )
        _check("attributes", len(set(self.attributes)) == len(self.attributes), ",".join(self.attributes), "different")
        _check("compile", self.compile in COMPILE_MODES, self.compile, f"one of {', '.join(COMPILE_MODES)}")
        known = f"one of {', '.join(SWEEP_PRECISIONS)}"
        _check("sweep_precision", self.sweep_precision in SWEEP_PRECISIONS, self.sweep_precision, known)
        _check(
            "hidden", all(width >= 1 for width in self.hidden), self.hidden, "widths of at least 1, for example 400,200"
        )
        rate = _schedule("lr", self.lr)
        _check(
            "lr",
            rate.lowest >= 0 and rate.over(1)(0) > 0,
            self.lr,
            "a positive number or a schedule such as cosine:0.01:0",
        )
        lowest = _schedule("kl_weight", self.kl_weight).lowest
        _check("kl_weight", lowest >= 0, self.kl_weight, "a number of at least 0 or a schedule such as geometric:10:1")

    @property
    def criterion(self) -> str:
        """One of `CRITERIA`: what the best weights are best in."""
        return self.choose_by or ("accuracy" if self.labels else "bound")

    @property
    def steps_to_evaluate(self) -> int:
        """How many steps q is refined in evaluation."""
        return self.refine_steps if self.eval_refine_steps is None else self.eval_refine_steps

    def to_json(self) -> str:
        """The text of `config.json`, from which the run can be repeated."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _schedule(name: str, text: str) -> Schedule:
    try:
        return schedule(text)
    except InputError as error:
        raise InputError(f"{option(name)}: {error}") from None


def option(name: str) -> str:
    """How a field is written on the command line.

    >>> option("batch_size")
    '--batch-size'
    """
    return "--" + {"plugins": "plugin"}.get(name, name).replace("_", "-")


def _check(name: str, fine: bool, got: Any, expected: str) -> None:
    if not fine:
        raise InputError(f"{option(name)} must be {expected}; got {got}")


def configure(settings: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """`base` (the defaults) with `settings` on top, whose values may be text.

    Raises:
        InputError: an unknown setting, or a value of the wrong kind or out of range.

    >>> configure({"batch-size": "50", "hidden": "400,200"}).hidden
    (400, 200)
    """
    known = {item.name: item for item in fields(TrainConfig)}
    values = {}
    for key, value in settings.items():
        name = {"plugin": "plugins"}.get(key, key).replace("-", "_")
        if name not in known:
            raise unknown_name("setting", key, (option(item)[2:] for item in known))
        values[name] = _read(name, str(known[name].type), value)
    return replace(base or TrainConfig(), **values)


def _read(name: str, kind: str, value: Any) -> Any:
    if value is None and "None" in kind:
        return None
    kind = kind.removesuffix(" | None")
    try:
        if kind == "int":
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value)
        if kind == "float":
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if kind == "bool":
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if kind == "str":
            if isinstance(value, (list, tuple, dict)):
                raise TypeError
            return f"{value:.12g}" if isinstance(value, float) else str(value)
        if kind == "dict[str, str]":
            return {str(key): str(entry) for key, entry in dict(value).items()}
        items = [item for item in value.split(",") if item] if isinstance(value, str) else list(value)
        if "int" in kind and any(isinstance(item, float) for item in items):
            raise ValueError
        return tuple(int(item) for item in items) if "int" in kind else tuple(str(item) for item in items)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
        expected = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "a text",
            "dict[str, str]": "a table of names and values",
        }
        raise InputError(
            f"{option(name)} must be {expected.get(kind, 'a list such as 400,200')}; got {value!r}"
        ) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        InputError: there is no such file, or it is not TOML.
    """
    return _read_table(path, "TOML", tomllib.loads, tomllib.TOMLDecodeError)


def read_config(path: Path) -> TrainConfig:
    """The configuration that a run wrote.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    try:
        return configure(_read_table(path, "JSON", json.loads, json.JSONDecodeError))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None


def _read_table(path: Path, kind: str, parse: Any, failure: type[Exception]) -> dict[str, Any]:
    try:
        table = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected a {kind} file of settings") from None
    except (failure, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path} holds a {type(table).__name__}; expected a table of settings")
    return table
