"""How many values of one variable are used: `python -m benchmarks.revival --data-root DIR --out DIR`. Prints a table.

With one variable and a linear decoder the model is a mixture of k products of Bernoulli variables with equal weights.
Expectation maximisation (`benchmarks.one_variable`) fits the same mixture without an encoder, and is the reference. A
linear encoder can say the mixture's posterior exactly, because that is linear in the pixels.

Beside `direct-rb` with epsilon 1 and a KL weight that falls to 1 stand the same without that fall, Gumbel-softmax,
`exact`, and vector quantisation that replaces unused codes (`vector-quantize-pytorch`, the extra `experiments`). A run
whose figures stand in `--out` is not made again. `--only` names runs, and `--set` changes a setting of theirs, to tune
them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.one_variable import STARTS, fit
from dgrad.config import configure
from dgrad.data import unit
from dgrad.errors import DgradError
from dgrad.files.atomic import write_text
from dgrad.training.build import Build
from dgrad.training.trainer import Trainer

HEAT = 60.0
COOLED = 0.6
"""The KL weight of the first step, where it falls to 1, and the share of the run after which it is 1."""
COLLAPSED_EPOCHS = 2
"""Of `exact` at a low rate, which ends with a handful of values: the collapsed start."""
DIRECT = {"estimator": "direct-rb", "kl": "inside", "set": {"epsilon": "1"}}
RUNS: dict[str, dict[str, Any]] = {
    "direct-rb": {**DIRECT, "falls": HEAT, "lr": "cosine:0.3:0"},
    "direct-rb, collapsed start": {**DIRECT, "falls": HEAT, "lr": "cosine:0.3:0", "start": "collapsed"},
    "direct-rb, KL weight 1": {**DIRECT, "lr": "cosine:0.3:0"},
    "exact": {"estimator": "exact", "kl": "outside", "falls": HEAT, "lr": "cosine:0.3:0"},
    "gumbel-softmax": {
        "estimator": "gumbel-softmax",
        "kl": "outside",
        "set": {"temperature": "0.5"},
        "falls": HEAT,
        "lr": "cosine:0.03:0",
    },
    "vector quantisation": {"width": 64, "decay": 0.8, "replace": 2, "lr": 0.003},
    "expectation maximisation": {"start": "annealed", "prior_count": 1.0},
}
"""Each run with its settings.

`falls`: the KL weight of the first step. `replace`: codes that fewer images of a batch chose, on average, are redrawn.
"""


@dataclass(frozen=True)
class Mixture:
    """A trained model: the logits of the encoder for some images, and the decoder's table of k images, as logits."""

    encoder: Callable[[Tensor], Tensor]  # [B, pixels] -> [B, k]
    table: Tensor  # [k, pixels]

    def log_likelihoods(self, images: Tensor) -> Tensor:
        """`log p(x | z)` of every image and value, `[N, k]`, in nats."""
        return images @ self.table.T - F.softplus(self.table).sum(1)


@torch.no_grad()
def figures_of(mixture: Mixture, images: Tensor) -> dict[str, float]:
    """What one split says: the bound, the mixture's own likelihood, and how the values are used."""
    k = len(mixture.table)
    bound = likelihood = 0.0
    usage, chosen, chosen_by_posterior = torch.zeros(k), torch.zeros(k), torch.zeros(k)
    for part in images.split(1000):
        log_q = mixture.encoder(part).log_softmax(-1)  # [B, k]
        of_values = mixture.log_likelihoods(part)
        q = log_q.exp()
        bound += float((q * (log_q.clamp_min(-1e6) - of_values)).sum()) + len(part) * math.log(k)
        likelihood += float((math.log(k) - of_values.logsumexp(1)).sum())
        usage += q.sum(0)
        chosen += torch.bincount(log_q.argmax(1), minlength=k)
        chosen_by_posterior += torch.bincount(of_values.argmax(1), minlength=k)
    share = usage / usage.sum()
    return {
        "bound": bound / len(images),
        "likelihood": likelihood / len(images),
        "used": int((chosen > 0).sum()),
        "used_by_posterior": int((chosen_by_posterior > 0).sum()),
        "perplexity": float(torch.special.entr(share).sum().exp()),
    }


# Training


def discrete_vae(settings: dict[str, Any], common: dict[str, Any], start: dict[str, Tensor] | None = None) -> Trainer:
    """A trainer at the end of its run, with the weights that were best on the validation images."""
    changes = {name: value for name, value in settings.items() if name not in ("falls", "start")}
    trainer = Trainer(configure({**common, **changes}))
    if "falls" in settings:
        cooled = int(COOLED * trainer.training_step.total)
        trainer = Trainer(configure({**common, **changes, "kl_weight": f"geometric:{settings['falls']:g}:1:{cooled}"}))
    if start is not None:
        trainer.model.load_state_dict(start)
    while not trainer.training_step.done:
        trainer.train_step()
        if trainer.step % trainer.batches.steps_per_epoch == 0:
            trainer.figures.keep_best({"epoch": 0, "step": trainer.step, **trainer.figures.validate()})
    trainer.model.load_state_dict(trainer.figures.best_weights)
    return trainer


def mixture_of(trainer: Trainer) -> Mixture:
    """What a trained model says."""
    model = trainer.model.eval()
    first = model.decoder.first
    table = (first.weight.T + first.bias).detach()  # type: ignore[operator,union-attr]
    return Mixture(lambda images: model.encoder(images.view(-1, *model.image_shape)).flatten(1), table)


class VectorQuantised(nn.Module):
    """A linear encoder, the nearest of k vectors, a linear decoder."""

    def __init__(self, pixels: int, k: int, settings: dict[str, Any]) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-untyped]

        width = settings["width"]
        self.encoder, self.decoder = nn.Linear(pixels, width), nn.Linear(width, pixels)
        self.quantise = VectorQuantize(
            dim=width,
            codebook_size=k,
            decay=settings["decay"],
            threshold_ema_dead_code=settings["replace"],
            kmeans_init=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The mean loss of a batch."""
        codes, _, commitment = self.quantise(self.encoder(images).unsqueeze(1))
        outputs = self.decoder(codes.squeeze(1))
        return (F.softplus(outputs).sum(1) - (images * outputs).sum(1)).mean() + commitment.sum()

    def mixture(self) -> Mixture:
        """Its deterministic encoder as logits, and its table."""
        codebook = self.quantise.codebook.detach()
        return Mixture(lambda x: -1e4 * torch.cdist(self.encoder(x), codebook), self.decoder(codebook).detach())


def vector_quantised(settings: dict[str, Any], images: Tensor, valid: Tensor, common: dict[str, Any]) -> Mixture:
    """The model that was best on the validation images."""
    torch.manual_seed(common["seed"])
    k, batch_size = int(common["latent"].removeprefix("1x")), common["batch_size"]
    model = VectorQuantised(images.shape[1], k, settings)
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    steps = common["epochs"] * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least = model.state_dict(), math.inf
    for _ in range(common["epochs"]):
        model.train()
        for chosen in torch.randperm(len(images))[: steps // common["epochs"] * batch_size].split(batch_size):
            optimizer.zero_grad()
            model(images[chosen]).backward()
            optimizer.step()
            schedule.step()
        bound = figures_of(model.eval().mixture(), valid)["bound"]
        if bound < least:
            best, least = copy.deepcopy(model.state_dict()), bound
    model.load_state_dict(best)
    return model.eval().mixture()


def expectation_maximised(settings: dict[str, Any], images: Tensor, common: dict[str, Any]) -> Mixture:
    """The fit, whose encoder is its own posterior."""
    k, generator = int(common["latent"].removeprefix("1x")), Generator().manual_seed(common["seed"])
    table = torch.logit(fit(images, k, generator, STARTS[settings["start"]], settings["prior_count"]))
    return Mixture(lambda x: x @ table.T - F.softplus(table).sum(1), table)


# The command


def measure(name: str, settings: dict[str, Any], common: dict[str, Any], splits: dict[str, Tensor]) -> dict[str, Any]:
    """The figures of one run, by split."""
    began = time.perf_counter()
    if "width" in settings:
        mixture = vector_quantised(settings, splits["train"], splits["valid"], common)
    elif "prior_count" in settings:
        mixture = expectation_maximised(settings, splits["train"], common)
    else:
        start = None
        if settings.get("start") == "collapsed":
            collapsing = {"estimator": "exact", "kl": "outside", "lr": "0.01"}
            start = discrete_vae(collapsing, {**common, "epochs": COLLAPSED_EPOCHS}).model.state_dict()
        mixture = mixture_of(discrete_vae(settings, common, start))
    seconds = time.perf_counter() - began
    of_splits = {split: figures_of(mixture, images) for split, images in splits.items()}
    return {"run": name, "settings": settings, "common": common, "seconds": seconds, **of_splits}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="mnist", help="a data set of dgrad, its pixels rounded at 0.5")
    parser.add_argument("--data-root", help="where it is on disk")
    parser.add_argument("--out", type=Path, required=True, help="the directory that figures are kept in")
    parser.add_argument("--values", type=int, default=1024, metavar="K", help="values of the variable")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all these runs")
    given = parser.parse_args()
    common = {
        "dataset": given.dataset,
        "data_root": given.data_root,
        "latent": f"1x{given.values}",
        "epochs": given.epochs,
        "batch_size": given.batch_size,
        "seed": given.seed,
        "device": "cpu",
    }
    changes = dict(pair.split("=", 1) for pair in given.set)
    changes = {name: value if name == "lr" and ":" in value else json.loads(value) for name, value in changes.items()}
    try:
        data = Build(configure(common)).evaluation_data
    except DgradError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    parts = {"train": data.train, "valid": data.valid, "test": data.test}
    splits = {name: unit(part.images).flatten(1) for name, part in parts.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    columns = f"{'valid':>8} {'test':>8} {'test, its posterior':>20} {'used':>6} {'used, train':>11} {'perplexity':>10}"
    print(f"{'':40}{columns}   nats an image; values")
    for name in given.only:
        settings = {**RUNS[name], **changes}
        label = " ".join([name, *given.set, f"1x{given.values} {given.epochs} {given.batch_size} {given.seed}"])
        file = given.out / f"{label.replace(' ', '_').replace('/', '-')}.json"
        if not file.is_file():
            write_text(file, json.dumps(measure(name, settings, common, splits), indent=2) + "\n")
        found = json.loads(file.read_text())
        test, train = found["test"], found["train"]
        print(
            f"{' '.join([name, *given.set]):40}{found['valid']['bound']:8.2f} {test['bound']:8.2f} "
            f"{test['likelihood']:20.2f} {test['used']:6d} {train['used']:11d} {test['perplexity']:10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
