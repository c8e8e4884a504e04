"""The settings of a training run, in groups. A field holds all that is known of a setting.

The same names serve on the command line (`--batch-size`), in a TOML file (`batch-size = 100`) and in a run's
`config.json`. Options, help and checks are made from the fields: a new setting is a new field.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any, NamedTuple

from dgrad.core.schedules import Schedule, schedule
from dgrad.errors import InputError, unknown_name
from dgrad.hyperparameters import check_owners, flat_set, set_of

BINARIZATIONS = ("threshold", "static", "dynamic", "none")
COMPILE_MODES = ("auto", "on", "off")

Check = Callable[[Any], str]
"""What a value must be, where it is something else; empty where it is right."""


# Checks of a field


def at_least(least: int) -> Check:
    """A whole number that is large enough, and fits 64 bits."""

    def check(value: int) -> str:
        if value < least:
            return f"a whole number of at least {least}"
        return "" if value < 2**62 else "a number below 2**62"

    return check


def one_of(*choices: str) -> Check:
    """One of several names."""
    return lambda value: "" if value in choices else f"one of {', '.join(choices)}"


def within(expected: str, right: Callable[[float], bool]) -> Check:
    """A number that `right` accepts."""
    return lambda value: "" if right(value) else expected


def scheduled(expected: str, right: Callable[[Schedule], bool]) -> Check:
    """The text of a schedule that `right` accepts."""
    return lambda text: "" if right(schedule(text)) else expected


def _name(value: str) -> str:
    return "" if value.strip() else "a name"


SHARE = within("a share of at least 0 and below 1", lambda value: 0 <= value < 1)
WEIGHT = within("a finite number of at least 0", lambda value: 0 <= value < math.inf)


# Groups of settings


@dataclass(frozen=True)
class About:
    """What a field knows of its setting beside name, type and default.

    Attributes:
        help: a line for `--help`.
        check: of its values; None is never checked.
        metavar: the kind of value in the help, where the type does not say it.
        otherwise: what the default None, or an empty one, stands for.
        needs_labels: whether the setting, unless it is 0 or empty, needs `labels`.
    """

    help: str
    check: Check | None = None
    metavar: str = ""
    otherwise: str = ""
    needs_labels: bool = False


def setting(default: Any, help: str, check: Check | None = None, **more: Any) -> Any:
    """A field of a group; the arguments are those of `About`."""
    metadata = {"about": About(help, check, **more)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def about(item: Field[Any]) -> About:
    """What a field knows of its setting."""
    known: About = item.metadata["about"]
    return known


@dataclass(frozen=True)
class Settings:
    """A group of settings, checked when an instance is made.

    Raises:
        InputError: a value cannot be.
    """

    panel = ""  # the group's name in the help

    def __post_init__(self) -> None:
        for item in fields(self):
            check, value = about(item).check, getattr(self, item.name)
            if check is None or value is None:
                continue
            try:
                expected = check(value)
            except InputError as error:
                raise InputError(f"{option(item.name)}: {error}") from None
            _require(item.name, not expected, _shown(value), expected)


@dataclass(frozen=True)
class DataSettings(Settings):
    """The images."""

    panel = "Data"
    dataset: str = setting("digits", "A name of `dgrad datasets`, a .npz file, or a folder of images by class.", _name)
    data_root: str | None = setting(
        None, "Where data sets are on disk.", metavar="DIR", otherwise="$DGRAD_DATA or the user's cache"
    )
    binarize: str = setting(
        "threshold",
        "Grey pixels: threshold (at 0.5), static (drawn once), dynamic (drawn anew), none (grey).",
        one_of(*BINARIZATIONS),
    )


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The networks, and the code between them."""

    panel = "Model"
    latent: str = setting("20x10", "The code: VARIABLESxVALUES; `dgrad latents` lists others.", _name)
    model: str = setting("linear", "linear, mlp, mixture (Gaussian variables beside the code), conv.", _name)
    hidden: tuple[int, ...] = setting(
        (),
        "Widths of hidden layers, from the image to the code: 400,200.",
        lambda widths: "" if min(widths, default=1) >= 1 else "widths of at least 1, for example 400,200",
    )
    gaussian: int | None = setting(
        None,
        "Gaussian variables beside the code; 0 for none in conv.",
        at_least(0),
        otherwise="mixture 20, conv 64 with --labels, else 0",
    )
    dropout: float | None = setting(None, "Share of hidden units left out; mixture only.", SHARE, otherwise="0")
    input_dropout: float = setting(0.0, "Share of pixels hidden from the encoder in a step.", SHARE)
    likelihood: str = setting("bernoulli", "bernoulli, squared-error (behind a tanh), discretized-logistic (grey).")


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """The gradient estimator, and what it minimises."""

    panel = "Estimator and objective"
    estimator: str = setting("direct", "Gradient estimator; `dgrad estimators` lists them.", _name)
    set: dict[str, str] = setting(  # noqa: RUF009
        {}, "Hyper-parameter; repeatable: samples=4, direct.epsilon=geometric:1:0.02."
    )
    kl: str | None = setting(
        None,
        "The KL: outside (exact, beside the estimate) or inside the objective.",
        one_of("outside", "inside"),
        otherwise="what suits the estimator",
    )
    kl_weight: str | None = setting(
        None,
        "Weight of the code's KL in training; 0 only reports it.",
        scheduled("a number of at least 0 or a schedule such as geometric:10:1", lambda weight: weight.lowest >= 0),
        metavar="SCHEDULE",
        otherwise="1; of mixtures without labels it rises to 1",
    )
    refine_steps: int = setting(0, "Sweeps that refine q for the decoder.", at_least(0))


@dataclass(frozen=True)
class OptimisationSettings(Settings):
    """The length and the size of the steps."""

    panel = "Optimisation"
    epochs: int = setting(100, "Passes over the training images.", at_least(1))
    steps: int | None = setting(None, "Number of steps, instead of epochs.", at_least(1))
    batch_size: int = setting(100, "Images in a step.", at_least(1))
    lr: str | None = setting(
        None,
        "Adam's learning rate: a number or a schedule.",
        scheduled(
            "a positive number or a schedule such as cosine:0.01:0",
            lambda rate: rate.lowest >= 0 and rate.over(1)(0) > 0,
        ),
        metavar="SCHEDULE",
        otherwise="what suits the model and the estimator",
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay, not on biases.", WEIGHT)


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """When the model is evaluated, how exactly, and which weights are kept."""

    panel = "Evaluation"
    eval_every: int = setting(1, "Epochs between evaluations on validation images.", at_least(1))
    choose_by: str | None = setting(
        None,
        "The best weights by validation: bound, reconstruction, accuracy.",
        one_of("bound", "reconstruction", "accuracy"),
        otherwise="accuracy with --labels, else bound",
    )
    eval_samples: int = setting(10, "Codes for each image in the final test.", at_least(1))
    eval_refine_steps: int | None = setting(
        None, "--refine-steps in evaluation.", at_least(0), otherwise="as in training"
    )


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where and how the run is computed."""

    panel = "Run"
    seed: int = setting(0, "Of weights, order of the data, noise, evaluation.", at_least(0))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    compile: str = setting("auto", "Compiled kernels: on, off, auto (for long runs).", one_of(*COMPILE_MODES))
    sweep_precision: str = setting(
        "float32", "Of a deep decoder's sweep: float32, bfloat16.", one_of("float32", "bfloat16")
    )
    plugins: tuple[str, ...] = setting((), "A module or a .py file to load first; repeatable.", metavar="PLUGIN")


@dataclass(frozen=True)
class LabelSettings(Settings):
    """Training with few labels."""

    panel = "Few labels"
    labels: int = setting(0, "Training images that show their label; latent 1xCLASSES or ATTRIBUTESx2.", at_least(0))
    attributes: tuple[str, ...] = setting(
        (),
        "The attributes that are labels: Eyeglasses,Smiling.",
        lambda names: "" if len({*names}) == len(names) else "different",
        otherwise="all",
        needs_labels=True,
    )
    labelled_batch: int = setting(50, "Labelled images in a step, beside --batch-size others.", at_least(0))
    pretrain_steps: int = setting(0, "Steps on labelled images alone, first.", at_least(0), needs_labels=True)
    label_loss: str = setting(
        "cross-entropy", "cross-entropy (of the logits), or code (of a draw).", one_of("cross-entropy", "code")
    )
    label_weight: float = setting(50.0, "Weight of that loss.", WEIGHT)
    balance_weight: float = setting(30.0, "Weight of the balance of classes in the code.", WEIGHT)
    independence_weight: float | None = setting(
        None,
        "Weight of the covariance of code and Gaussian variables.",
        WEIGHT,
        otherwise="1000 with attributes, else 0",
    )
    adversarial_weight: float = setting(0.0, "Weight of the virtual adversarial loss.", WEIGHT, needs_labels=True)
    adversarial_radius: float = setting(
        2.0,
        "Euclidean norm of its change of the pixels.",
        within("a finite number above 0", lambda radius: 0 < radius < math.inf),
    )
    propagate_labels: float = setting(
        0.0,
        "Share of images labelled by neighbours.",
        within("a share of 0 to 1", lambda share: 0 <= share <= 1),
        needs_labels=True,
    )
    augment: bool = setting(False, "Redraw labelled images by small affine maps.", needs_labels=True)


@dataclass(frozen=True)
class TrainConfig(
    LabelSettings, RunSettings, EvaluationSettings, OptimisationSettings, ObjectiveSettings, ModelSettings, DataSettings
):
    """All settings of a training run, flat: `config.lr`. `docs/settings.md` explains each.

    A function that needs one group alone may be typed with it, for example with `OptimisationSettings`.
    Fields come in the order of the help, from the last base to the first.

    Raises:
        InputError: a value cannot be, or two do not go together.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in fields(self):
            alone = about(item).needs_labels and not self.labels and getattr(self, item.name)
            _require(item.name, not alone, "it without --labels", "given with --labels")
        refined = self.refine_steps and self.labels
        _require("refine_steps", not refined, "it with --labels", "0, or given without --labels")
        _require(
            "labelled_batch",
            self.labelled_batch > 0 or self.pretrain_steps > 0,
            "0",
            "at least 1, or given with --pretrain-steps: something has to see the labels",
        )
        _require(
            "choose_by",
            self.choose_by != "accuracy" or self.labels > 0,
            "accuracy without --labels",
            "bound or reconstruction, or given with --labels",
        )

    @property
    def criterion(self) -> str:
        """The figure that the best weights are best in: bound, reconstruction or accuracy."""
        return self.choose_by or ("accuracy" if self.labels else "bound")

    @property
    def steps_to_evaluate(self) -> int:
        """How many steps q is refined in evaluation."""
        return self.refine_steps if self.eval_refine_steps is None else self.eval_refine_steps

    def to_json(self) -> str:
        """The text of `config.json`, from which the run can be repeated."""
        return json.dumps(asdict(self), indent=2) + "\n"


def option(name: str) -> str:
    """How a field is written on the command line.

    >>> option("batch_size")
    '--batch-size'
    """
    return "--" + {"plugins": "plugin"}.get(name, name).replace("_", "-")


def panel_of(name: str) -> str:
    """The group that a setting belongs to, as the help names it."""
    groups = (group for group in TrainConfig.__mro__ if issubclass(group, Settings))
    return next(group.panel for group in groups if name in get_annotations(group))


def _require(name: str, right: object, got: str, expected: str) -> None:
    if not right:
        raise InputError(f"{option(name)} must be {expected}; got {got}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if value == "" or str(value).isspace() else str(value)


# Reading


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        raise TypeError
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _items(value: Any) -> Iterable[Any]:
    return [item for item in value.split(",") if item] if isinstance(value, str) else list(value)


class Kind(NamedTuple):
    """How values of a type are read, what they must be, and their name in the help."""

    read: Callable[[Any], Any]
    expected: str
    metavar: str


KINDS = {
    "int": Kind(_whole, "a whole number", "N"),
    "float": Kind(_number, "a number", "NUMBER"),
    "bool": Kind(_truth, "true or false", ""),
    "str": Kind(_text, "a text", "NAME"),
    "dict[str, str]": Kind(flat_set, "a table of names and values", "NAME=VALUE"),
    "tuple[int, ...]": Kind(lambda value: tuple(map(_whole, _items(value))), "a list such as 400,200", "N,N"),
    "tuple[str, ...]": Kind(lambda value: tuple(map(str, _items(value))), "a list such as a,b", "NAME,NAME"),
}


def kind_of(item: Field[Any]) -> Kind:
    """The kind of a field's values."""
    return KINDS[str(item.type).removesuffix(" | None")]


LISTS = tuple(item.name for item in fields(TrainConfig) if str(item.type).startswith("tuple"))
"""Settings whose one value is a list."""


def with_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of settings with the names of `TrainConfig`, and its hyper-parameters by `NAME` or `ESTIMATOR.NAME`.

    >>> with_names({"batch-size": 5, "set": {"direct": {"sweep-share": 0.1}}})
    {'batch_size': 5, 'set': {'direct.sweep_share': 0.1}}
    """
    settings = {{"plugin": "plugins"}.get(name, name).replace("-", "_"): value for name, value in table.items()}
    if "set" in settings:
        settings["set"] = _read("set", KINDS["dict[str, str]"], settings["set"])
    return settings


def configure(settings: Mapping[str, Any], base: TrainConfig | None = None) -> TrainConfig:
    """`base` (the defaults) with `settings` on top, whose values may be text.

    Raises:
        InputError: an unknown setting, or a value of the wrong kind or out of range.

    >>> configure({"batch-size": "50", "hidden": "400,200"}).hidden
    (400, 200)
    """
    known = {item.name: item for item in fields(TrainConfig)}
    values: dict[str, Any] = {}
    for name, value in with_names(settings).items():
        if name not in known:
            raise unknown_name("setting", name.replace("_", "-"), (option(item)[2:] for item in known))
        may_be_none = value is None and "None" in str(known[name].type)
        values[name] = None if may_be_none else _read(name, kind_of(known[name]), value)
    if "set" in values:
        estimator = values.get("estimator", (base or TrainConfig).estimator)
        check_owners(values["set"], [estimator])
        values["set"] = {name: str(value) for name, value in set_of(estimator, values["set"]).items()}
    return replace(base or TrainConfig(), **values)


def _read(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
        raise InputError(f"{option(name)} must be {kind.expected}; got {value!r}") from None


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
