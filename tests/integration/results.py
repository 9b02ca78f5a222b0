"""What a run has left behind, judged by plain torch and by the ledger."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from shardline.ledger import Balance, Ledger
from tests.integration.shell import ROOT, Failure

WANTED_ACCURACY = 0.97


def accuracy(folder: Path) -> float:
    """Of model.safetensors on the digits that were held out. Raises Failure when it is too low."""
    model = runpy.run_path(str(ROOT / "examples" / "digits.py"))["cnn"]()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    pixels, digits = load_digits(return_X_y=True)
    _, held_out = train_test_split(
        range(len(pixels)), test_size=0.2, stratify=digits, random_state=0
    )
    images = torch.tensor(pixels[held_out], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    with torch.no_grad():
        hits = model(images).argmax(dim=1) == torch.tensor(digits[held_out])
    share = float(hits.double().mean())
    if share < WANTED_ACCURACY:
        raise Failure(f"the model reads {share:.1%} of the digits, {WANTED_ACCURACY:.0%} is wanted")
    return share


def balance(folder: Path) -> Balance:
    """What became of every sample. Raises Failure when one was lost or repeated."""
    ledger = Ledger()
    with (folder / "updates.jsonl").open("rb") as lines:
        ledger.read(lines)
    found = ledger.balance()
    if found.samples_lost or found.samples_repeated or found.malformed_ledger_lines:
        raise Failure(f"not every sample was used exactly once: {found}")
    return found
