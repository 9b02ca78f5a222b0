"""The programs in docs/recipes.md train what plain torch trains."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster
from tests.documents import ROOT
from tests.features.three_ways import NUM_STEPS, SIZES, Returned
from tests.reference import JOB_SEED, SEED, assert_close, samples

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def function_of(title: str) -> Callable[..., Any]:
    """The `train` that a section of the page defines."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (text,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(text, names)  # noqa: S102 - our own page
    function: Callable[..., Any] = names["train"]
    return function


# -- GANs ------------------------------------------------------------------------------------------


def gan() -> tuple[nn.Module, nn.Module]:
    def net(num_in: int, num_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(num_in, 9), nn.Tanh(), nn.Linear(9, num_out)).double()

    return net(3, 7), net(7, 1)


def gan_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Real samples and noise."""
    return (samples(sum(SIZES), step) for step in range(NUM_STEPS))


def gan_of_the_page(session: Session) -> Returned:
    generator, discriminator = gan()
    own = session.rank
    batches = ((x.split(list(SIZES))[own], z.split(list(SIZES))[own]) for x, z in gan_batches())
    function_of("GANs")(session, generator, discriminator, batches)
    return {**nn.ModuleList([generator, discriminator]).state_dict()}


def test_gans(cluster: Cluster) -> None:
    torch.manual_seed(SEED)
    generator, discriminator = gan()
    first = torch.optim.Adam(generator.parameters(), lr=1e-3)
    second = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    loss = nn.functional.binary_cross_entropy_with_logits
    for real, noise in gan_batches():
        judged, fooled = discriminator(real), discriminator(generator(noise).detach())
        second.zero_grad()
        (loss(judged, torch.ones_like(judged)) + loss(fooled, torch.zeros_like(fooled))).backward()
        second.step()
        fooled = discriminator(generator(noise))
        first.zero_grad()
        loss(fooled, torch.ones_like(fooled)).backward()
        first.step()
    expected = nn.ModuleList([generator, discriminator]).state_dict()
    for rank, result in enumerate(cluster.run(gan_of_the_page, environ=JOB_SEED)):
        assert_close(result.tensors, expected, 1e-10, f"worker {rank}")
