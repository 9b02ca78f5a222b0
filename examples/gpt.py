"""Write Python one character at a time: a small GPT that reads Python's own standard library.

    python examples/gpt.py                                       # alone, in this process
    shardline run --shards 2 --workers 2 examples/gpt.py         # two workers share every update
    shardline run --shards 2 --workers 4 --stages 2 examples/gpt.py   # two times two half models

Plain PyTorch, except for the lines that say `session`.
"""

import argparse
import string
import sysconfig
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, TensorDataset

import shardline

ALPHABET = "\n" + string.printable[:95]  # the newline and every printable ASCII character

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
parser.add_argument("--width", type=int, default=128, help="features per character")
parser.add_argument("--heads", type=int, default=4, help="attention heads; must divide the width")
parser.add_argument("--context", type=int, default=64, help="characters the model can look at")
parser.add_argument("--batch-size", type=int, default=32, help="samples per update, all workers")
parser.add_argument("--steps", type=int, default=600, help="number of updates")
parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate of AdamW")


def standard_library() -> Tensor:
    """The top-level modules, one after the other, as indices into ALPHABET."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(module.read_text(encoding="ascii", errors="ignore") for module in modules)
    return torch.tensor([ALPHABET.index(char) for char in text if char in ALPHABET])


def evenly_spaced(text: Tensor, context: int, count: int) -> Subset[tuple[Tensor, ...]]:
    """`count` windows of the text, each with the same window one character later."""
    windows = text.unfold(0, context + 1, 1)  # all of them, as views of the one text
    starts = [i * len(windows) // count for i in range(count)]
    return Subset(TensorDataset(windows[:, :-1], windows[:, 1:]), starts)


class Block(nn.Module):
    """Causal self-attention, then a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, context, features)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class Embedding(nn.Module):
    """Indices of characters (batch, context) in, features (batch, context, width) out."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(torch.randn(context, width))

    def forward(self, text: Tensor) -> Tensor:
        features: Tensor = self.characters(text) + self.positions
        return features


def gpt(layers: int, width: int, heads: int, context: int) -> nn.Sequential:
    """Logits (batch, context, alphabet) of the successor of each character."""
    return nn.Sequential(
        OrderedDict(
            embedding=Embedding(width, context),
            blocks=nn.Sequential(*(Block(width, heads) for _ in range(layers))),
            head=nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))),
        )
    )


def mean_loss(logits: Tensor, successors: Tensor) -> Tensor:
    """In nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), successors.to(logits.device).flatten())


def main() -> None:
    args = parser.parse_args()
    text = standard_library()
    cut = len(text) * 9 // 10  # the last tenth is held out

    with shardline.connect() as session:
        torch.manual_seed(session.seed)
        with session.model():
            model = gpt(args.layers, args.width, args.heads, args.context).to(session.device)
        optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=args.lr), model)
        train_step = session.step(model, mean_loss)
        # The learning rate climbs for a twentieth of the steps, then goes straight down to zero.
        schedule = session.scheduler(
            lambda optimizer: LambdaLR(
                optimizer, lambda step: max(0, min(20 * step + 20, args.steps - step)) / args.steps
            )
        )

        batch_size = max(1, args.batch_size // session.world_size)
        count = args.steps * batch_size * session.world_size  # so one epoch is all the steps
        windows = evenly_spaced(text[:cut], args.context, count)
        loader = session.loader(windows, batch_size=batch_size)

        for _ in session.epochs(1):
            for batch in loader:
                loss = train_step(batch)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if loss is not None:  # this worker has the last layers
                    session.log(loss=loss)

        held_out = DataLoader(evenly_spaced(text[cut:], args.context, 512), batch_size=64)
        outputs = [(session.evaluate(model, x), y) for x, y in held_out]
        losses = [mean_loss(logits, y).item() for logits, y in outputs if logits is not None]
        if losses:
            final = sum(losses) / len(losses)
            session.report(loss=final, steps=args.steps)
            if session.rank == 0:
                print(f"held-out loss {final:.4f} nats per character")


if __name__ == "__main__":
    main()
