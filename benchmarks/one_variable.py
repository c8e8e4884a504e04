"""How low the bound of a single variable can get: `python -m benchmarks.one_variable --data-root DIR`. Prints a table.

With one variable of k values any decoder is a table of k images: the model is a mixture of k products of Bernoulli
variables with equal weights, and its bound, whatever the encoder, is at least its negative log-likelihood. That is
fitted here by expectation maximisation, from random images and annealed ([Ueda & Nakano
1998](https://doi.org/10.1016/S0893-6080(97)00133-0)): images belong to components by the likelihood to the power
beta, which rises to 1. No local optimum is a proof, so several seeds of both are shown.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Generator, Tensor

from dgrad.config import configure
from dgrad.data import unit
from dgrad.errors import DgradError
from dgrad.kernels.denormals import flush_denormals
from dgrad.training.build import Build

STARTS = {"random": 1.0, "annealed": 0.05}
"""Beta of the first pass over the images."""
GROWTH = 1.04
"""Its factor from pass to pass, up to 1."""
SPREAD = 0.02
"""Weight of the random image that is mixed into each component while beta is below 1: they draw together, and once
alike stay alike.
"""
ENOUGH = 0.0005
"""The passes end when one improves the training images' likelihood by less, in nats an image."""


def log_likelihoods(images: Tensor, means: Tensor) -> Tensor:
    """Of images `[N, pixels]` under each component of means `[k, pixels]`, in nats: `[N, k]`."""
    return images @ torch.logit(means).T + torch.log1p(-means).sum(1)


def negative_log_likelihood(images: Tensor, means: Tensor) -> float:
    """Nats an image, under the mixture with equal weights."""
    return math.log(len(means)) - float(log_likelihoods(images, means).logsumexp(1).mean())


@flush_denormals(torch.device("cpu"))  # most images have next to no share in most components
def fit(images: Tensor, k: int, generator: Generator, first_beta: float, prior_count: float = 1.0) -> Tensor:
    """Means `[k, pixels]` of a mixture of k components with equal weights, fitted to binary images `[N, pixels]`.

    A component counts `prior_count` images more than belong to it, each the mean of all; so no mean is 0 or 1.
    """

    def mixed(means: Tensor, weight: float) -> Tensor:
        """With that weight of a random image."""
        drawn = images[torch.randint(len(images), (k,), generator=generator)]
        return means.lerp(drawn, weight).clamp(1e-4, 1 - 1e-4)

    prior = 0.9 * images.mean(0) + 0.05
    means, beta, before = mixed(prior.expand(k, -1), 0.25), first_beta, math.inf
    while True:
        if beta < 1:
            means = mixed(means, SPREAD)
        likelihoods = log_likelihoods(images, means)  # [N, k]
        if beta >= 1:
            now = math.log(k) - float(likelihoods.logsumexp(1).mean())
            if before - now < ENOUGH:
                return means
            before = now
        belongs = (beta * likelihoods).softmax(1)
        means = (belongs.T @ images + prior_count * prior) / (belongs.sum(0).unsqueeze(1) + prior_count)
        beta = min(1.0, beta * GROWTH)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="mnist", help="a data set of dgrad, its pixels rounded at 0.5")
    parser.add_argument("--data-root", help="where it is on disk")
    parser.add_argument(
        "--values", type=int, nargs="+", default=[8, 40, 64], metavar="K", help="values of the variable"
    )
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if min(given.seeds, *given.values) < 1:
        parser.error(f"--seeds and --values must be 1 or more; got {given.seeds} and {given.values}")
    try:
        config = configure({"dataset": given.dataset, "data_root": given.data_root})
        data = Build(config).evaluation_data
    except DgradError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    train, valid, test = (unit(part.images).flatten(1) for part in (data.train, data.valid, data.test))
    columns = f"{'latent':>7} {'start':>9} {'seed':>4} {'train':>8} {'validation':>10} {'test':>8}"
    print(f"{columns}   negative log-likelihood, nats an image")
    for k in given.values:
        for start, first_beta in STARTS.items():
            for seed in range(given.seeds):
                means = fit(train, k, Generator().manual_seed(seed), first_beta)
                figures = [negative_log_likelihood(images, means) for images in (train, valid, test)]
                row = f"{figures[0]:8.2f} {figures[1]:10.2f} {figures[2]:8.2f}"
                print(f"{f'1x{k}':>7} {start:>9} {seed:4d} {row}", flush=True)


if __name__ == "__main__":
    main()
