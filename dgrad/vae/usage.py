"""What a code is used for: values in use, perplexity, information and distinct codes among the images of a split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.latent_layer import LatentLayer
from dgrad.core.restricted import Restricted
from dgrad.data import Split, unit
from dgrad.vae.evaluation import evaluating
from dgrad.vae.model import DiscreteVAE

IMAGES_AT_ONCE = 500
LISTED = 4096
"""Up to this many codes the mean q is summed exactly, over all images."""
COMPARED = 4096
"""Of larger supports so many images are compared, each code with the q of every image."""
NUMBERS_KEPT = 2**24
"""Fewer images where their logits would be more numbers than that: 64 MiB of float32."""
LEAST_INFORMATION = 0.1
"""Below this share of the information that it could have, a code says next to nothing of the image."""
LEAST_DISTINCT = 0.1
"""Below this share of the codes that as many images of a perfectly used code would have, ten images share a code."""
LEAST_USED = 0.5
"""The same share of the values of the variables."""


@dataclass(frozen=True)
class Variables:
    """What each variable of a code is used for; an entry for each variable.

    Attributes:
        values: how many values it has.
        used: how many of them are the most probable value of some image.
        perplexity: `exp H` of its mean distribution: how many values it would have if all were as frequent.
        information: between image and value, in nats: the entropy of the mean distribution less the mean entropy.
        frequencies: the mean distribution, `[n, k]`.
    """

    values: list[int]
    used: list[int]
    perplexity: list[float]
    information: list[float]
    frequencies: Float[Tensor, "n k"]


@dataclass(frozen=True)
class CodeUsage:
    """What the code of a model is used for.

    Attributes:
        images: how many images were looked at.
        codes: how many codes there are.
        distinct_codes: among the most probable codes of the images.
        information: the mutual information of image and code, in nats; None for a layer without probabilities.
        information_limit: the most that it can be, in nats: the logarithm of the number of codes, or of the images that
            were compared, whichever is less.
        variables: of each variable; None for a layer without marginal probabilities.
    """

    images: int
    codes: int
    distinct_codes: int
    information: float | None
    information_limit: float
    variables: Variables | None

    def to_json(self) -> dict[str, Any]:
        """The figures as `summary.json` has them, with what follows from them."""
        figures: dict[str, Any] = {
            "images": self.images,
            "distinct_codes": self.distinct_codes,
            "information": self.information,
            "information_limit": self.information_limit,
        }
        if self.variables is not None:
            count = len(self.variables.values)
            figures |= {
                "values_in_use": sum(self.variables.used) / count,
                "values": sum(self.variables.values) / count,
                "perplexity": sum(self.variables.perplexity) / count,
                "variables": {
                    "values": self.variables.values,
                    "used": self.variables.used,
                    "perplexity": self.variables.perplexity,
                    "information": self.variables.information,
                },
            }
        return {**figures, "collapsed": self.collapsed}

    @property
    def collapsed(self) -> str | None:
        """Why the code is collapsed, in a few words; None for one that is not.

        A perfectly used code of K values, drawn N times, shows `K (1 - (1 - 1/K)^N)` of them. A code is collapsed where
        it has less than a tenth of these distinct codes, where its variables use fewer than half of their values by the
        same measure, or where it has less than a tenth of the information that it could have.
        """
        images = f"for {self.images:,} images"
        if self.images < 2:
            return None
        if self.distinct_codes < LEAST_DISTINCT * _expected(self.codes, self.images):
            return f"{_counted(self.distinct_codes, 'distinct code')} {images}"
        if self.variables is not None:
            values, used = self.variables.values, sum(self.variables.used)
            if used < LEAST_USED * sum(_expected(count, self.images) for count in values):
                return f"{used:,} of {sum(values):,} values in use {images}"
        if self.information is not None and self.information < LEAST_INFORMATION * self.information_limit:
            return f"{self.information:.2f} nats of information of {self.information_limit:.2f} {images}"
        return None


def _expected(kinds: int, draws: int) -> float:
    """How many of so many equally frequent kinds are seen in so many draws."""
    return -kinds * math.expm1(draws * math.log1p(-1 / kinds)) if 1 < kinds < 2**60 else min(kinds, draws)


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}" + "s" * (count != 1)


@torch.no_grad()
def code_usage(model: DiscreteVAE, split: Split, *, generator: Generator | None) -> CodeUsage:
    """What the code is used for, on a split.

    Images are encoded in parts, and what is kept does not grow with their number beyond a limit: sums over images, the
    distinct codes, and for larger supports the logits of at most 4,096 images.

    Information of a code of up to 4,096 values is exact. Otherwise it is estimated from one draw for each image that is
    compared, and is at most the logarithm of their number (Hoffman & Johnson 2016, ELBO surgery).

    Args:
        generator: for the draws, on the device of the images. With None nothing is drawn, and information that would be
            estimated is None.
    """
    layer, count = model.layer, len(split)
    compared = _evenly(count, min(count, COMPARED, max(1, NUMBERS_KEPT // math.prod(layer.shape))))
    sums, distinct, kept = _Sums(layer), _Distinct(), []
    listed = _Listed(layer) if layer.listable and layer.support_size <= LISTED and layer.defines("log_prob") else None
    with evaluating(model):
        for start in range(0, count, IMAGES_AT_ONCE):
            logits = model.posterior(unit(split.images[start : start + IMAGES_AT_ONCE])).logits
            codes = layer.argmax(logits)
            distinct.add(layer.indices(codes))
            sums.add(logits, codes)
            if listed is not None:
                listed.add(logits)
            else:
                inside = compared[(compared >= start) & (compared < start + len(logits))] - start
                kept.append(logits[inside.to(logits.device)])
    information: float | None = None
    if listed is not None:
        information = listed.information(count)
    elif generator is not None and layer.defines("log_prob"):
        information = _estimated_information(layer, torch.cat(kept), generator)
    images = len(compared) if listed is None else count
    return CodeUsage(
        images=count,
        codes=layer.support_size,
        distinct_codes=distinct.count,
        information=information,
        information_limit=min(math.log(layer.support_size), math.log(images)),
        variables=sums.variables(count),
    )


def _evenly(count: int, chosen: int) -> Tensor:
    """So many of `count` places, evenly spaced: a split may be sorted by class."""
    return torch.arange(chosen) * count // max(chosen, 1)


def _estimated_information(layer: LatentLayer, logits: Tensor, generator: Generator) -> float:
    """`E[log q(z | x) - log mean_x' q(z | x')]`, z drawn from `q(z | x)`, over these images."""
    codes = layer.sample(logits, generator=generator).squeeze(0)  # [N, *code]
    count = len(logits)
    # some layers multiply every code with all logits
    per_call = max(1, NUMBERS_KEPT // (count * (1 if layer.one_hot_rows else math.prod(layer.shape))))
    total = 0.0
    for start in range(0, count, per_call):
        part = codes[start : start + per_call]
        of_images = layer.log_prob(logits, part.unsqueeze(1))  # [P, N]
        own = of_images.diagonal(start)[: len(part)]
        total += float((own - of_images.logsumexp(1)).double().sum())
    return total / count + math.log(count)


class _Distinct:
    """The different codes so far, in their integer form."""

    def __init__(self) -> None:
        self.codes: Tensor | None = None

    def add(self, indices: Tensor) -> None:
        new = indices.flatten(1)
        self.codes = (new if self.codes is None else torch.cat([self.codes, new])).unique(dim=0)

    @property
    def count(self) -> int:
        return 0 if self.codes is None else len(self.codes)


class _Listed:
    """Sums over images of q, for every code of a small support."""

    def __init__(self, layer: LatentLayer) -> None:
        self.layer = layer
        self.q = torch.zeros((), dtype=torch.float64)  # [K]
        self.entropy = torch.zeros((), dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        if self.layer.one_hot_rows and self.layer.shape[0] == 1:  # its codes are its values
            q = self.layer.mean(logits).squeeze(1).double()  # [B, K]
        else:
            q = self.layer.support(logits)[1].double().exp().mT  # [B, K]
        self.q = self.q.to(q.device) + q.sum(0)
        self.entropy = self.entropy.to(q.device) + torch.special.entr(q).sum()

    def information(self, count: int) -> float:
        return max(0.0, float(torch.special.entr(self.q / count).sum() - self.entropy / count))


class _Sums:
    """Sums over images of what each variable is used for, by value."""

    def __init__(self, layer: LatentLayer) -> None:
        self.layer = layer
        self.q = torch.zeros((), dtype=torch.float64)  # [n, k]
        self.chosen = torch.zeros((), dtype=torch.float64)  # [n, k]
        self.entropy = torch.zeros((), dtype=torch.float64)  # [n]

    def add(self, logits: Tensor, codes: Tensor) -> None:
        if not self.layer.defines("mean"):
            return
        q = _rows(self.layer, self.layer.mean(logits)).double()  # [B, n, k]
        self.q = self.q.to(q.device) + q.sum(0)
        self.chosen = self.chosen.to(q.device) + _rows(self.layer, codes).double().sum(0)
        self.entropy = self.entropy.to(q.device) + torch.special.entr(q).sum((0, -1))

    def variables(self, count: int) -> Variables | None:
        if not self.q.ndim:
            return None
        of_mean = torch.special.entr(self.q / count).sum(-1)
        return Variables(
            values=_sizes(self.layer, self.q),
            used=(self.chosen > 0).sum(-1).tolist(),
            perplexity=of_mean.exp().tolist(),
            information=(of_mean - self.entropy / count).clamp_min(0.0).tolist(),
            frequencies=(self.q / count).cpu(),
        )


def _rows(layer: LatentLayer, codes: Tensor) -> Tensor:
    """Codes or their means as rows of values, `[B, n, k]`. In other layers a coordinate has the values 1 and 0."""
    seen = layer.decoded(codes)
    if seen.ndim > 2:
        return seen.flatten(1, -2)
    seen = seen.clamp(0, 1)
    return torch.stack([seen, 1 - seen], -1)


def _sizes(layer: LatentLayer, rows: Tensor) -> list[int]:
    """How many values each variable has."""
    if isinstance(layer, Restricted) and layer.one_hot_rows:
        sizes: list[int] = layer.allowed[0].sum(-1).tolist()
        return sizes
    return [rows.shape[-1]] * len(rows)
