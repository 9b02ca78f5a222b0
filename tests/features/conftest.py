from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, one_thread


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with one_thread(), Cluster(num_shards=3, num_workers=2) as cluster:
        yield cluster
