"""A discrete code for each letter of a name, between two transformers. Padding is masked."""

import sys

import torch
from torch import Tensor, nn

import dgrad

LETTERS = "_abcdefghijklmnopqrstuvwxyz0123456789"


class Bottleneck(nn.Module):
    """Each letter becomes two variables of four values: 16 codes for 37 letters. The context tells the rest."""

    def __init__(self, estimator: dgrad.GradientEstimator, length: int) -> None:
        super().__init__()
        self.layer, self.estimator = dgrad.latent("2x4"), estimator
        self.embedding, self.places = nn.Embedding(len(LETTERS), 32), nn.Parameter(torch.randn(length, 32) / 10)
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.decoder = (nn.TransformerEncoder(block, 1, enable_nested_tensor=False) for _ in range(2))
        self.to_logits, self.from_codes, self.to_letters = nn.Linear(32, 8), nn.Linear(8, 32), nn.Linear(32, 37)

    def forward(self, letters: Tensor) -> Tensor:
        """The bound of each name, in nats: integers `[B, T]`, -1 where there is no letter, to `[B]`."""
        mask = letters >= 0  # [B, T]
        hidden = self.encoder(self.embedding(letters.clamp(min=0)) + self.places, src_key_padding_mask=~mask)
        logits = self.to_logits(hidden).unflatten(-1, self.layer.shape)  # [B, T, 2, 4]

        def loss(codes: Tensor) -> Tensor:  # [S, B, T, 2, 4] to [S, B]
            inputs = (self.from_codes(codes.flatten(-2)) + self.places).flatten(0, 1)  # [S*B, T, 32]
            targets = letters.repeat(len(codes), 1)  # [S*B, T]
            outputs = self.to_letters(self.decoder(inputs, src_key_padding_mask=targets < 0))
            losses = nn.functional.cross_entropy(outputs.mT, targets, ignore_index=-1, reduction="none")
            return losses.sum(-1).unflatten(0, codes.shape[:2])

        kl = dgrad.restricted(self.layer, mask=mask).kl(logits)  # [B]
        return self.estimator(self.layer, logits, loss, mask=mask).loss + kl


def train(steps: int = 1000, estimator: str = "st-gumbel-softmax") -> tuple[float, float]:
    """The bound of a name, before and after. The names are those of Python's modules."""
    torch.manual_seed(0)
    names = [torch.tensor([*map(LETTERS.index, name.lower())]) for name in sorted(sys.stdlib_module_names)]
    letters = nn.utils.rnn.pad_sequence(names, batch_first=True, padding_value=-1)  # [N, T]
    model = Bottleneck(dgrad.estimator(estimator), letters.shape[1])
    optimizer, bounds = torch.optim.Adam(model.parameters(), lr=0.003), []
    for _ in range(steps):
        loss = model(letters[torch.randint(len(letters), (64,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(loss.item())
    return bounds[0], sum(bounds[-10:]) / 10


if __name__ == "__main__":
    print("bound before and after: {:.1f}, {:.1f}".format(*train()))
