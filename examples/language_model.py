"""A task of your own, a transformer with tied embeddings: svag-fast run examples/language_model.py --batch-size 8"""

import torch
from torch import nn

import svag_fast

torch.manual_seed(0)
tokens = (torch.randint(16, (500, 1)) + torch.randint(1, 4, (500, 1)) * torch.arange(13)) % 16  # counts by 1, 2 or 3


class Transformer(nn.Module):
    """From tokens [B, 12] to logits [B, 12, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(16, 32), nn.Embedding(12, 32), nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight  # tied; called as a layer, so per-sample norms are measured
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Each position sees those before it."""
        x = self.embed(tokens) + self.place(torch.arange(12))
        return self.head(self.block(x, nn.Transformer.generate_square_subsequent_mask(12)) / 32**0.5)


def loss(model, tokens):
    """Each sequence's mean over its tokens, [B]."""
    return nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none").mean(1)


task = svag_fast.Task(model=Transformer, train=tokens[:400], test=tokens[400:], loss=loss, name="counting")
if __name__ == "__main__":
    print(svag_fast.study(task, batch_size=8, lr=0.3, l=(1, 2), seeds=2, effective_steps=20).as_dict()["headline"])
