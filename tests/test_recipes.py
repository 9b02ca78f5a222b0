"""Every recipe gives the model that the plain script beside it gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.documents import ROOT
from tests.reference import JOB_SEED, SEED, assert_close

pytestmark = pytest.mark.timeout(TEST_SECONDS)

PAGE: Final = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SHARED: Final = re.findall(r"^```python shared\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
RECIPES: Final[Mapping[str, tuple[str, str]]] = {
    title: (in_session, plain)
    for title, in_session, plain in re.findall(
        r"^##+ ([^\n]*)\n(?:(?!^##|^```).*\n)*"
        r"```python session\n((?:(?!^```).*\n)*)```\n\n```python plain\n((?:(?!^```).*\n)*)```$",
        PAGE,
        re.MULTILINE,
    )
}
"""Title → the block of a session and the plain one."""


def run(code: str, **names: object) -> dict[str, Tensor]:
    """The tensors of the model that the code has trained."""
    namespace: dict[str, Any] = dict(names)
    exec(SHARED + code, namespace)  # noqa: S102 - our own page
    return {name: tensor.detach() for name, tensor in namespace["model"].state_dict().items()}


def cook(session: Session, *, title: str) -> Mapping[str, Tensor]:
    return run(RECIPES[title][0], session=session)


def test_every_block_of_the_page_is_part_of_a_recipe() -> None:
    assert len(re.findall("^```python [a-z]", PAGE, re.MULTILINE)) == 1 + 2 * len(RECIPES)
    assert len(RECIPES) > 10


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_gives_the_model_of_the_plain_script(title: str) -> None:
    with one_thread(), Cluster(num_shards=2, num_workers=2) as cluster:
        alone = run_alone(cook, environ=JOB_SEED, title=title)
        results = cluster.run(cook, environ=JOB_SEED, title=title)
        expected = []
        for workers in (1, 2):
            torch.manual_seed(SEED)
            expected.append(run(RECIPES[title][1], workers=workers))
    assert_close(alone.tensors, expected[0], 1e-10, "alone")
    for rank, result in enumerate(results):
        assert_close(result.tensors, expected[1], 1e-10, f"worker {rank}")
