"""Read handwritten digits: a small CNN on the 1797 scans of 8x8 pixels that scikit-learn brings.

    python examples/digits.py                                      # alone, in this process
    shardline run --shards 2 --workers 2 examples/digits.py        # two workers share every update
    shardline run --strategy allreduce --workers 2 examples/digits.py             # without shards
    shardline run --workers 2 --stages 2 examples/digits.py          # each has half of the layers

Plain PyTorch, except for the lines that say `session`.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

import shardline

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--epochs", type=int, default=15, help="passes over the training digits")
parser.add_argument("--batch-size", type=int, default=64, help="samples per update, all workers")
parser.add_argument("--lr", type=float, default=5e-3, help="first learning rate of AdamW")


def cnn() -> nn.Sequential:
    """Images (batch, 1, 8, 8) in, one logit per digit (batch, 10) out."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images that the model reads correctly."""
    return float((logits.argmax(dim=1).cpu() == labels).double().mean())


def main() -> None:
    args = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # from 0 to 1
    labels = torch.tensor(digits)
    # One image in five is held out, the same ones in every run, with equal shares of each digit.
    train, test = train_test_split(
        range(len(images)), test_size=0.2, stratify=digits, random_state=0
    )

    with shardline.connect() as session:
        torch.manual_seed(session.seed)
        with session.model():
            model = cnn().to(session.device)
        optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), lr=args.lr), model)
        schedule = session.scheduler(lambda o: CosineAnnealingLR(o, T_max=args.epochs))
        train_step = session.step(model, nn.CrossEntropyLoss(label_smoothing=0.1))

        loader = session.loader(
            TensorDataset(images[train], labels[train]),
            batch_size=max(1, args.batch_size // session.world_size),
        )

        for _ in session.epochs(args.epochs):
            for batch in loader:
                loss = train_step(batch)
                optimizer.step()
                optimizer.zero_grad()
                if loss is not None:  # this worker has the last layers
                    session.log(loss=loss)
            schedule.step()
            if session.rank == 0:
                logits = session.evaluate(model, images[test])
                if logits is not None:
                    session.log(accuracy=accuracy(logits, labels[test]))

        logits = session.evaluate(model, images[test])
        if logits is not None:
            final = accuracy(logits, labels[test])
            session.report(accuracy=final)
            if session.rank == 0:
                print(f"held-out accuracy {final:.4f}")


if __name__ == "__main__":
    main()
