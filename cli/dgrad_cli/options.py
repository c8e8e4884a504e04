"""The options that stand for a setting of `TrainConfig`, as several commands have them. May import typer; no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dgrad.config import TrainConfig, option

DEFAULTS = TrainConfig()


def setting(help_text: str, name: str, *names: str, kind: str | None = None) -> Any:
    """An option that is left out unless the user gives it, and whose help shows the default of `TrainConfig`."""
    default = getattr(DEFAULTS, name)
    annotation = str(TrainConfig.__dataclass_fields__[name].type)
    kind = kind or {"int": "INTEGER", "float": "NUMBER"}.get(annotation.removesuffix(" | None"), "TEXT")
    shown = "" if default in (None, {}, ()) else f" (default: {default})"
    return typer.Option(*(names or (option(name),)), help=help_text + shown, metavar=kind, show_default=False)


EstimatorOption = Annotated[str | None, setting("Gradient estimator; `dgrad estimators` lists them.", "estimator")]
SetOption = Annotated[
    list[str] | None,
    setting(
        "A hyper-parameter of the estimator: epsilon=0.5, epsilon=geometric:1:0.02, samples=4; repeatable. `dgrad estimators` has the defaults: a constant epsilon or temperature, where the paper anneals from 1 (exponential:1:1e-5:1000:0.1), which with the KL trained lets the code collapse.",
        "set",
        kind="NAME=VALUE",
    ),
]
LatentOption = Annotated[str | None, setting("Latent code: VARIABLESxVALUES; `dgrad latents` lists others.", "latent")]
DatasetOption = Annotated[
    str | None, setting("A name from `dgrad datasets`, a .npz file, or a folder of images by class.", "dataset")
]
DataRootOption = Annotated[
    str | None,
    setting("Where data sets are on disk. (default: $DGRAD_DATA, else the user's cache folder)", "data_root"),
]
BinarizeOption = Annotated[
    str | None,
    setting("threshold (round at 0.5), static (one draw), dynamic (a new draw each time), none (grey).", "binarize"),
]
ModelOption = Annotated[
    str | None,
    setting(
        "linear, mlp, mixture (Gaussian variables beside the code), or conv (the same with convolutions).", "model"
    ),
]
HiddenOption = Annotated[str | None, setting("Widths of hidden layers, from the image to the code: 400,200.", "hidden")]
GaussianOption = Annotated[
    str | None, setting("Gaussian variables beside the code. (default: mixture 20, conv 64)", "gaussian")
]
DropoutOption = Annotated[
    str | None,
    setting("Share of hidden units left out in a training step, in the mixture model. (default: 0)", "dropout"),
]
InputDropoutOption = Annotated[
    str | None, setting("Share of pixels hidden from the encoder in a step.", "input_dropout")
]
LikelihoodOption = Annotated[str | None, setting("bernoulli, or squared-error (behind a tanh).", "likelihood")]
KLOption = Annotated[
    str | None,
    setting(
        "outside (exact, beside the estimate) or inside the objective. (default: inside for the direct family, else outside)",
        "kl",
    ),
]
KLWeightOption = Annotated[
    str | None,
    setting(
        "Weight of the code's KL in training, or a schedule of it; at 0 it is reported, not trained.",
        "kl_weight",
        kind="NUMBER",
    ),
]
LabelsOption = Annotated[
    str | None,
    setting(
        "How many training images show their label, balanced over classes, or their attributes; needs a latent 1xCLASSES or ATTRIBUTESx2.",
        "labels",
    ),
]
AttributesOption = Annotated[
    str | None,
    setting(
        "The attributes that are labels, one for each variable of the code: Eyeglasses,Smiling. (default: all)",
        "attributes",
    ),
]
LabelledBatchOption = Annotated[
    str | None, setting("Labelled images in a step, beside --batch-size others.", "labelled_batch")
]
PretrainStepsOption = Annotated[
    str | None,
    setting(
        "Steps on labelled images alone, --batch-size of them, before all others; with --labels only.", "pretrain_steps"
    ),
]
LabelLossOption = Annotated[
    str | None,
    setting("cross-entropy (of the logits), or code: a loss of the code, through the estimator.", "label_loss"),
]
LabelWeightOption = Annotated[str | None, setting("Weight of that loss.", "label_weight")]
BalanceWeightOption = Annotated[
    str | None, setting("Weight of the balance of the classes in the code; with --labels only.", "balance_weight")
]
IndependenceWeightOption = Annotated[
    str | None,
    setting(
        "Weight of the independence of Gaussian variables from the code; with --labels only. (default: 1000 with attributes, else 0)",
        "independence_weight",
    ),
]
AdversarialWeightOption = Annotated[
    str | None,
    setting(
        "Weight of the virtual adversarial loss: that the code hardly changes near an image; with --labels only.",
        "adversarial_weight",
    ),
]
AdversarialRadiusOption = Annotated[
    str | None, setting("How near: the Euclidean norm of the change of the pixels.", "adversarial_radius")
]
PropagateLabelsOption = Annotated[
    str | None,
    setting(
        "Share of the images that get the label of the images that look like them, the clearest ones; with --labels only.",
        "propagate_labels",
    ),
]
AugmentOption = Annotated[
    bool | None,
    typer.Option(
        "--augment/--no-augment",
        help="Redraw labelled images by small random affine maps. (default: --no-augment)",
        show_default=False,
    ),
]
EpochsOption = Annotated[str | None, setting("Passes over the training images.", "epochs")]
StepsOption = Annotated[str | None, setting("Number of steps, instead of epochs.", "steps")]
BatchSizeOption = Annotated[str | None, setting("Images in a step.", "batch_size")]
RateOption = Annotated[
    str | None,
    setting(
        "Adam's learning rate or a schedule of it; the paper's constant 0.001 learns more slowly.",
        "lr",
        kind="RATE",
    ),
]
WeightDecayOption = Annotated[str | None, setting("Decoupled weight decay, not on biases.", "weight_decay")]
SeedOption = Annotated[str | None, setting("Of the weights, the order of the data, the noise, the evaluation.", "seed")]
DeviceOption = Annotated[str | None, setting("auto, cpu, cuda, cuda:1, mps.", "device")]
CompileOption = Annotated[
    str | None,
    setting(
        "Kernels compiled on this machine: on, off, or auto (for runs long enough to gain by it); kept for later runs.",
        "compile",
    ),
]
SweepPrecisionOption = Annotated[
    str | None,
    setting(
        "Of the sweep's matrix products, where the decoder has hidden layers: float32 or bfloat16.", "sweep_precision"
    ),
]
EvalEveryOption = Annotated[str | None, setting("Epochs between evaluations on the validation images.", "eval_every")]
ChooseByOption = Annotated[
    str | None,
    setting(
        "What the best weights are best in, on the validation images: bound, reconstruction or accuracy. (default: accuracy with --labels, else bound)",
        "choose_by",
    ),
]
EvalSamplesOption = Annotated[str | None, setting("Codes for each test image in the final evaluation.", "eval_samples")]
RefineStepsOption = Annotated[
    str | None,
    setting(
        "Sweeps by which each image's q is made better than the encoder's, for the decoder to learn from.",
        "refine_steps",
    ),
]
EvalRefineStepsOption = Annotated[
    str | None, setting("The same in evaluation. (default: as in training)", "eval_refine_steps")
]
PluginOption = Annotated[
    list[str] | None, setting("A plugin to load: a module or a .py file; repeatable.", "plugins", kind="PLUGIN")
]
