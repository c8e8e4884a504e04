"""Learning from few labels: `dgrad train --plugin examples/few_labels.py --latent 1x10 --labels 30`.

Before training, half of the images get the label of the labelled image that is nearest. In training, an image and a
noisy copy of it are to have the same code (Sajjadi et al. 2016).
"""

import torch
from torch import nn

import dgrad
from dgrad.data import unit

SHARE = 0.5  # of the images, those nearest to a labelled one
NOISE = 0.3  # standard deviation, pixels are in [0, 1]


@dgrad.hookimpl
def dgrad_label_images(images, index, labels):
    pixels = unit(images).flatten(1)  # [N, pixels]
    nearest = torch.cdist(pixels, pixels[index]).min(1)
    places = nearest.values.topk(round(SHARE * len(images)), largest=False).indices.sort().values
    return places, labels[nearest.indices[places]]  # a labelled image is nearest to itself


@dgrad.recordable  # the same work at every step: a GPU may record it
class Consistency(nn.Module):
    """`weight * KL(q(x) || q(x + noise))`, the mean over images, in nats."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, encoded):
        noise = torch.empty_like(encoded.seen).normal_(0, NOISE, generator=encoded.generator)
        log_q = encoded.posterior.logits.log_softmax(-1).detach()  # [B, n, k]
        log_noisy = encoded.encode(encoded.seen + noise).logits.log_softmax(-1)
        return self.weight * (log_q.exp() * (log_q - log_noisy)).sum((-2, -1)).mean()


@dgrad.hookimpl
def dgrad_batch_losses(config):
    return {"consistency": Consistency(weight=10.0)} if config.labels else None
