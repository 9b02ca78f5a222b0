"""With backup workers: whose gradients a step is made of, the same on every shard. Pure."""

from __future__ import annotations

from collections.abc import Collection

from ps_server.policy import Consistency


class Seals:
    """Counts on which shards a worker's step is complete (Chen et al. 2016: the first N - b)."""

    def __init__(self, policy: Consistency, holders: frozenset[int]) -> None:
        """`holders`: the shards that hold parts."""
        self._policy = policy
        self._holders = holders
        self._shards: dict[tuple[int, int], set[int]] = {}
        """(step, worker) → the shards that have all of it; in the order of first reports."""
        self._sealed = -1

    def ready(self, shard: int, worker: int, step: int) -> None:
        """A shard has all of a worker's step. Repeats and old steps change nothing."""
        if step > self._sealed:
            self._shards.setdefault((step, worker), set()).add(shard)

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        for key in [key for key in self._shards if key[1] == worker]:
            del self._shards[key]

    def decide(self, step: int, able: Collection[int], num_members: int) -> frozenset[int]:
        """The contributors of `step` once there are enough of them among those `able` to take it;
        empty: not yet. Each step is decided once.
        """
        if not self._policy.sealed or step <= self._sealed:
            return frozenset()
        complete = frozenset(
            worker
            for (of, worker), shards in self._shards.items()
            if of == step and worker in able and shards >= self._holders
        )
        if not complete or len(complete) < min(self._policy.needed(num_members), len(able)):
            return frozenset()
        self._sealed = step
        self._shards = {key: value for key, value in self._shards.items() if key[0] > step}
        return complete
