"""Passes of several workers in lockstep, whoever comes and goes: every worker keeps its own books,
and what they come to is compared with each other and with a count that is made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from allreduce.passes import Passes
from allreduce.record import Reading
from allreduce.state import Agreed, adopt, encode
from ps_core.leases import Lease, PassSpec

MAX_WORKERS = 5
LOADERS = (0, 3)


class Lockstep(RuleBasedStateMachine):
    """Everything is done as AllReduceExchange does it, and in that order."""

    @initialize(
        num_workers=st.integers(1, 4),
        num_samples=st.integers(0, 45),
        batch_size=st.integers(1, 6),
        global_batch_size=st.sampled_from([0, 0, 3, 8]),
        seed=st.integers(0, 2**32),
    )
    def start(
        self,
        num_workers: int,
        num_samples: int,
        batch_size: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        self.random = Random(seed)
        self.specs = {
            0: PassSpec(num_samples, batch_size, global_batch_size),
            3: PassSpec(num_samples // 2, batch_size + 1),
        }
        self.crew = {rank: Agreed(Passes(rank)) for rank in range(num_workers)}
        self.drawn: dict[int, list[Lease]] = {rank: [] for rank in self.crew}
        self.dry: dict[int, set[int]] = {rank: set() for rank in self.crew}
        """Rank → loaders that have nothing more for it."""
        self.used: dict[int, Counter[int]] = {loader: Counter() for loader in LOADERS}
        """Positions of the open pass, counted here."""
        self.num_ended = 0
        self.offered: set[int] = set()
        """Loaders of which all that is free was dealt once more, and nothing was used since."""
        self.set_members()

    # -- What an exchange does ---------------------------------------------------------------------

    def set_members(self) -> None:
        for agreed in self.crew.values():
            agreed.passes.set_members(tuple(self.crew))
        self.forget_what_was_drawn()
        self.dry = {rank: set() for rank in self.crew}

    def forget_what_was_drawn(self) -> None:
        for rank, leases in self.drawn.items():
            assert not any(self.crew[rank].passes.holds(lease.id) for lease in leases)
            self.drawn[rank] = []

    def commit(self, ranks: Sequence[int], said: dict[int, list[Reading]]) -> None:
        """An update is complete on some workers."""
        seconds = {rank: self.random.choice([0.0, 0.5, 1.0, 4.0]) for rank in sorted(said)}
        readings = [each for rank in sorted(said) for each in said[rank]]
        for rank in ranks:
            agreed = self.crew[rank]
            agreed.round += 1
            for member, own in seconds.items():
                agreed.passes.measured(member, sum(r.length for r in said[member]), own)
            agreed.passes.use(readings)

    def count(self, said: dict[int, list[Reading]]) -> None:
        """Here."""
        for reading in (each for readings in said.values() for each in readings):
            assert reading.number == self.num_ended
            self.used[reading.loader].update(reading.positions)
            self.offered.discard(reading.loader)

    def consume(self, rank: int, at_most: int = 2) -> list[Reading]:
        """A step of some of what a worker has drawn."""
        own = self.drawn[rank]
        some = self.random.sample(own, k=min(len(own), self.random.randint(0, at_most)))
        self.drawn[rank] = [lease for lease in own if lease not in some]
        readings = self.crew[rank].passes.consume([lease.id for lease in some])
        assert len(readings) == len(some), "all of them were good"
        return readings

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            del self.crew[rank], self.drawn[rank], self.dry[rank]

    def adopt(self, rank: int, source: int) -> None:
        adopt(self.crew[rank], encode(self.crew[source]))

    # -- What happens ------------------------------------------------------------------------------

    @rule(loader=st.sampled_from(LOADERS), times=st.integers(1, 3), data=st.data())
    def draw(self, loader: int, times: int, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.crew)))
        self.draw_for(rank, loader, times)

    def draw_for(self, rank: int, loader: int, times: int) -> None:
        for _ in range(times):
            grant = self.crew[rank].passes.request(loader, self.specs[loader])
            assert grant.number == self.num_ended
            if not grant.leases:
                self.dry[rank].add(loader)
            self.drawn[rank] += grant.leases

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.crew)))
        if self.drawn[rank]:
            lease = self.drawn[rank].pop(self.random.randrange(len(self.drawn[rank])))
            self.crew[rank].passes.give_back([lease.id])

    @rule()
    def step(self) -> None:
        said = {rank: self.consume(rank) for rank in self.crew}
        self.commit(list(self.crew), said)
        self.count(said)

    @precondition(lambda self: len(self.crew) > 1)
    @rule(num_lost=st.integers(1, 2))
    def lose_some_before_a_step_is_complete_anywhere(self, num_lost: int) -> None:
        for rank in self.crew:
            self.consume(rank)
        self.kill(self.random.sample(sorted(self.crew), k=min(num_lost, len(self.crew) - 1)))
        self.set_members()
        self.commit(list(self.crew), {rank: [] for rank in self.crew})  # all abstain

    @precondition(lambda self: len(self.crew) > 1)
    @rule(num_lost=st.integers(1, 2))
    def lose_some_when_a_step_is_complete_on_others(self, num_lost: int) -> None:
        said = {rank: self.consume(rank) for rank in self.crew}
        lost = self.random.sample(sorted(self.crew), k=min(num_lost, len(self.crew) - 1))
        survivors = [rank for rank in self.crew if rank not in lost]
        ahead = self.random.sample(survivors, k=self.random.randint(1, len(survivors)))
        self.commit(ahead, said)
        self.count(said)
        for rank in ahead:
            self.consume(rank)  # of the next one, which will come to nothing
        self.kill(lost)
        behind = set(survivors) - set(ahead)
        for rank in behind:
            self.adopt(rank, source=min(ahead))
        self.set_members()
        for rank in sorted(behind):
            self.draw_for(rank, self.random.choice(LOADERS), 1)
        following = {rank: self.consume(rank) if rank in behind else [] for rank in survivors}
        self.commit(survivors, following)
        self.count(following)

    @precondition(lambda self: len(self.crew) < MAX_WORKERS)
    @rule(rank=st.integers(0, MAX_WORKERS - 1))
    def let_in(self, rank: int) -> None:
        if rank not in self.crew:
            source = self.random.choice(sorted(self.crew))
            self.crew[rank] = Agreed(Passes(rank))
            self.drawn[rank], self.dry[rank] = [], set()
            self.adopt(rank, source)
            self.crew = dict(sorted(self.crew.items()))
            self.set_members()

    @rule(share=st.floats(0, 1))
    def come_to_the_end(self, share: float) -> None:
        """Everybody has no more data, or its script breaks off."""
        for rank in self.crew:
            for loader in LOADERS:
                self.draw_for(rank, loader, 1)
        takers = [r for r, loaders in self.dry.items() if loaders == {*LOADERS}]
        takers = [rank for rank in takers if self.random.random() < share]
        for rank in takers:
            self.crew[rank].passes.give_back([lease.id for lease in self.drawn[rank]])
        goes_on = {agreed.passes.goes_on(takers) for agreed in self.crew.values()}
        assert len(goes_on) == 1, "all agree"
        if goes_on.pop():
            assert takers
            self.offered = {*LOADERS}
            self.forget_what_was_drawn()
            for rank in takers:
                self.dry[rank].clear()
                if grant := self.crew[rank].passes.more():
                    self.drawn[rank] += grant.leases
        else:
            self.end(is_wanted=bool(takers))

    def end(self, *, is_wanted: bool) -> None:
        for loader, spec in self.specs.items():
            is_complete = len(self.used[loader]) == spec.num_positions
            assert is_complete or not is_wanted or loader in self.offered
            self.used[loader].clear()
        for agreed in self.crew.values():
            agreed.passes.end()
        self.num_ended += 1
        self.offered.clear()
        self.forget_what_was_drawn()
        self.dry = {rank: set() for rank in self.crew}

    # -- What holds at any time --------------------------------------------------------------------

    @invariant()
    def all_agree(self) -> None:
        seen = [
            (
                agreed.round,
                agreed.passes.speeds,
                {loader: agreed.passes.num_ended[loader] for loader in LOADERS},
                {loader: self.used_by(agreed.passes, loader) for loader in LOADERS},
            )
            for agreed in self.crew.values()
        ]
        assert all(each == seen[0] for each in seen)

    @staticmethod
    def used_by(passes: Passes, loader: int) -> list[range]:
        current = passes.open.get(loader)
        return [] if current is None else list(current.used)

    @invariant()
    def nothing_is_used_twice_or_beyond_the_end(self) -> None:
        for loader, counts in self.used.items():
            assert all(count == 1 for count in counts.values())
            assert set(counts) <= set(range(self.specs[loader].num_positions))
            for agreed in self.crew.values():
                known = [p for each in self.used_by(agreed.passes, loader) for p in each]
                assert known == sorted(counts)

    @invariant()
    def no_position_is_in_two_hands(self) -> None:
        for loader in LOADERS:
            held = Counter(self.used[loader])
            for rank, leases in self.drawn.items():
                for lease in leases:
                    assert self.crew[rank].passes.holds(lease.id)
                    if lease.loader == loader:
                        held.update(range(lease.start, lease.start + lease.length))
            assert all(count == 1 for count in held.values())


TestLockstep = Lockstep.TestCase
TestLockstep.settings = settings(max_examples=150, stateful_step_count=40)
