"""A loss of the code: `dgrad train --plugin examples/code_loss.py --latent 20x10`; its first variable learns the class.

Every fourth training image shows its label. There, a first variable with another value than the label costs 10 nats.
The estimator carries that to the encoder like any other part of the objective.
"""

import torch
from torch import Tensor

import dgrad

WEIGHT = 10.0  # nats
LABELLED = 4  # every fourth image


@dgrad.hookimpl
def dgrad_code_losses(batch):
    if batch.labels is None:
        return None
    shown = (batch.index % LABELLED == 0).float()  # [B]; the index is the image's place in the training split

    def wrong_class(codes: Tensor) -> Tensor:
        if codes.ndim != 4:
            raise dgrad.InputError("the code loss needs categorical variables: take a latent such as 20x10")
        values = torch.arange(codes.shape[-1], device=codes.device)
        label = (batch.labels.unsqueeze(-1) == values).to(codes.dtype)  # [B, k]
        # 1 - z[0, label]: 0 where the first variable's value is the label, else 1
        return WEIGHT * shown * (1 - (codes[:, :, 0] * label).sum(-1))  # [S, B]

    return wrong_class
