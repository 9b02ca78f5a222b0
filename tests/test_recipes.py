"""What a page shows in a session trains what the plain script beside it trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from shardline.session import Session
from tests.cluster import TEST_SECONDS, Cluster, one_thread, run_alone
from tests.documents import ROOT
from tests.reference import JOB_SEED, SEED, assert_close

pytestmark = pytest.mark.timeout(TEST_SECONDS)

PAGES: Final = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("recipes", "consistency")
}
SHARED: Final = re.findall(
    r"^```python shared\n(.*?)^```$", PAGES["recipes"], re.MULTILINE | re.DOTALL
)[0]
ENVIRONMENTS: Final[Mapping[str, Mapping[str, str]]] = {
    "session": JOB_SEED,
    "session local": {
        **JOB_SEED,
        "SHARDLINE_CONSISTENCY_MODE": "local",
        "SHARDLINE_CONSISTENCY_LOCAL_STEPS": "1",
        "SHARDLINE_CONSISTENCY_OUTER_LR": "1",
        "SHARDLINE_CONSISTENCY_OUTER_MOMENTUM": "0",
    },
}
"""The mark of a block → how its job is configured."""


def _recipes(page: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Title of the section → mark and text of the block of a session, text of the plain one."""
    for section in re.split(r"^##+ ", PAGES[page], flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python ([^\n]+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        if blocks:
            (mark, in_session), (is_plain, plain) = blocks
            assert is_plain == "plain"
            yield f"{page}: {section.partition(chr(10))[0]}", (mark, in_session, plain)


RECIPES: Final = {title: recipe for page in PAGES for title, recipe in _recipes(page)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=2, num_workers=2) as cluster:
        yield cluster


def run(code: str, **names: object) -> dict[str, Tensor]:
    """The tensors of the model that the code has trained."""
    namespace: dict[str, Any] = dict(names)
    exec(SHARED + code, namespace)  # noqa: S102 - our own page
    return {name: tensor.detach() for name, tensor in namespace["model"].state_dict().items()}


def cook(session: Session, *, title: str) -> Mapping[str, Tensor]:
    return run(RECIPES[title][1], session=session)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_run(page: str) -> None:
    own = [recipe for title, recipe in RECIPES.items() if title.startswith(page)]
    num_shared = PAGES[page].count("```python shared\n")
    assert PAGES[page].count("```python") == num_shared + 2 * len(own) > 4


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_gives_the_model_of_the_plain_script(cluster: Cluster, title: str) -> None:
    mark, _, plain = RECIPES[title]
    environ = ENVIRONMENTS[mark]
    alone = run_alone(cook, environ=environ, title=title)
    results = cluster.run(cook, environ=environ, title=title)
    expected = []
    for workers in (1, 2):
        torch.manual_seed(SEED)
        expected.append(run(plain, workers=workers))
    assert_close(alone.tensors, expected[0], 1e-10, "alone")
    for rank, result in enumerate(results):
        assert_close(result.tensors, expected[1], 1e-10, f"worker {rank}")
