"""ParameterServerExchange: gradients to the shards, parameters back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ps_core import codec, dialogue
from ps_core.buckets import Bucket
from ps_core.codec import PartFrame
from ps_core.errors import JobFailedError, ProtocolError, ShardlineError
from ps_core.exchange import (
    HANDS_OVER,
    Arrival,
    Farewell,
    Grant,
    Meeting,
    Outcome,
    Purpose,
    Replica,
    Start,
    StateByParameter,
    Traffic,
    Work,
    new_incarnation,
)
from ps_core.extras import Extras
from ps_core.heartbeat import Heartbeat
from ps_core.job import describe_job
from ps_core.leases import PassSpec
from ps_core.metrics import WorkerMetrics
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.rpc import Frame
from ps_core.settings import Config
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.client import ShardClient
from ps_worker.inbox import Inbox
from ps_worker.lead_side import DirectLead, LeadSide, SharedLead
from ps_worker.state import cut_state, place_state
from ps_worker.values import Values

_LEAD = 0
"""The shard that leads."""


class ParameterServerExchange:
    """One worker's side of all shards. Public methods are for the training thread.

    Each shard's reader thread writes answers straight into the buckets' host parameters while the
    training thread waits in `settle`, or in a meeting.
    """

    def __init__(
        self, config: Config, metrics: WorkerMetrics, replica: Replica | None = None
    ) -> None:
        """Does not connect yet. With a `replica` this is one of its stages: all of them together
        are one worker, whose rank is in `config`, and each has the shards of its parameters.
        """
        self._config = config
        self._metrics = metrics
        self._replica = replica
        self._clients: dict[int, ShardClient] = {}
        """By shard."""
        self.traffic = Traffic()
        self.incarnation = new_incarnation()
        self._inbox = Inbox()
        self._heartbeat: Heartbeat | None = None
        self._lockstep = config.consistency.mode in ("sync", "local")
        self._epoch = 0
        self._versions: dict[int, int] = {}
        """Of each part held."""
        self._computed_with: tuple[int, int] = (0, 0)
        """The lowest and the highest version of the parts that the model last took over."""
        self._base: dict[int, int] = {}
        """The versions that the open step's gradients were computed from."""
        self._sent: dict[int, list[tuple[int | None, shard_pb2.ExchangeRequest | Frame]]] = {}
        """Shard → the messages of the open step: its begin, then pushes with the part's index."""
        self._chosen = False
        self._extras_are_final = False
        """Training is complete, and the lead has what the chosen worker has handed over."""
        self._abstained = False
        self._closed = False

    def leave_when(self, is_preempted: Callable[[], bool]) -> None:
        """Ask this in every wait that may be left, and raise Preempted when it is true."""
        self._inbox.is_preempted = is_preempted

    # -- Exchange ----------------------------------------------------------------------------------

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: Extras
    ) -> Start:
        """Enter the job on every shard and take its values. Blocks until all workers have joined,
        or until the others let this one into a running job.

        Raises ShardUnreachableError, MismatchError, DataLossError or JobFailedError, each within
        its timeout; JobOverError when there is nothing left to do.
        """
        self._plan = plan
        self._buckets = {bucket.layout.index: bucket for bucket in buckets}
        self._parts = {index: plan.parts_of_bucket(index) for index in self._buckets}
        self._own_parts = [part for parts in self._parts.values() for part in parts]
        self._part_numbers = [part.index for part in self._own_parts]
        self._versions = dict.fromkeys(self._part_numbers, 0)
        self._holders = sorted({part.shard for part in self._own_parts})
        self._positions = {
            placement.parameter: (bucket, position)
            for bucket in buckets
            for position, placement in enumerate(bucket.layout.placements)
        }
        self._clients = self._make_clients()
        self._lead = self._find_lead()
        self._values = Values(plan, self._buckets, extras, self._clients, self._explaining)
        if self._enter(codec.encode_job(describe_job(self._config, plan, optimizer))):
            self._values.load_initial()
        met = self._wait_for_all(Arrival(Purpose.START, 0))
        if met.refreshed:
            self._values.take_extras(joins=True)
        position = dialogue.decode_position(met.position) if met.HasField("position") else None
        return Start(met.step, met.chosen, position)

    def _make_clients(self) -> dict[int, ShardClient]:
        """One for each shard; a stage has its own ones, of which the first's include the lead."""
        replica, incarnation = self._replica, self.incarnation
        stage, num_stages = 0, 1
        if replica is not None:
            stage, num_stages = replica.stage, replica.num_stages
            incarnation = int.from_bytes(replica.share(incarnation.to_bytes(8, "little")), "little")
        rank, addresses = self._config.cluster.rank, self._config.cluster.shards
        self._worker = shard_pb2.WorkerId(rank=rank, incarnation=incarnation)
        return {
            index: ShardClient(index, addresses[index], self._worker, self._config)
            for index in range(stage, len(addresses), num_stages)
        }

    def _find_lead(self) -> LeadSide:
        client, replica = self._clients.get(_LEAD), self._replica
        direct = DirectLead(client, self._inbox) if client else None
        if replica is not None:
            return SharedLead(direct, replica, self._inbox)
        assert direct is not None, "without stages every worker speaks to every shard"
        return direct

    def _enter(self, job: shard_pb2.JobSpec) -> bool:
        """Join the lead, then the other shards; True: this worker's initial values count."""
        for client in self._clients.values():
            client.connect()
        first = self._lead.join(job)
        for index, client in self._clients.items():
            if index != _LEAD:
                client.join(job)
        for client in self._clients.values():
            client.open(self)
        if _LEAD in self._clients:
            seconds = self._config.membership.heartbeat_seconds
            self._heartbeat = Heartbeat(seconds, self._beat)
        return first

    def _explaining(self) -> contextlib.AbstractContextManager[None]:
        return self._inbox.explaining(2 * self._config.rpc.reconnect_seconds)

    def _beat(self) -> None:
        self._clients[_LEAD].send(shard_pb2.ExchangeRequest(heartbeat=shard_pb2.Heartbeat()))

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Tell every shard that holds parts, which answers all of them, also to one that abstains.

        A shard without parts has no answer to wait for: what it heard could be overtaken by news.
        """
        self._abstained = not work.weight
        self._inbox.expect(self._part_numbers, step + 1)
        begin = dialogue.encode_begin(step, self._epoch, work, hyperparameters)
        request = shard_pb2.ExchangeRequest(begin=begin)
        self._sent = {shard: [(None, request)] for shard in self._holders}
        if not self._lockstep:  # now: answers may come before `settle`
            self._base = dict(self._versions)
        for shard in self._holders:
            self._clients[shard].send(request)

    def submit(self, bucket: Bucket, step: int) -> None:
        """Queue the bucket's parts for their shards; each is copied once, when it is sent."""
        bucket.download()
        bucket.lend()  # the first answers may come while this worker still computes
        for part in self._parts[bucket.layout.index]:
            present = [bucket.present[self._positions[s.parameter][1]] for s in part.slices]
            frame = partial(codec.encode_push, step, part, present, bucket.host_gradients)
            self._sent[part.shard].append((part.index, frame))
            self._clients[part.shard].send(frame)
            self._metrics.pushed(part.shard, part.num_bytes)
            self.traffic.pushed_bytes += part.num_bytes

    def settle(self, step: int) -> Outcome:
        """Wait for every part. The shards bound the wait: they end the streams when the job has
        failed.
        """
        mark = self._inbox.wait_for_parts()
        self._sent = {}
        self._epoch = self._lead.settled(self._epoch)
        self._take_over()
        refused = self._inbox.take_refusal()
        version = min(self._versions.values())
        if self._lockstep:
            applied = not self._abstained and refused is None
            return Outcome(mark, version, applied, staleness=0)
        own = 0 if self._abstained else 1
        staleness = max(self._versions[p] - v - own for p, v in self._base.items())
        return Outcome(step + 1, version, not self._abstained, staleness)

    def _take_over(self) -> None:
        """All parts are here: the model computes with them from now on."""
        self.traffic.pulled_bytes += sum(part.num_bytes for part in self._own_parts)
        self._computed_with = self._received_versions()
        for bucket in self._buckets.values():
            bucket.upload()

    def _received_versions(self) -> tuple[int, int]:
        versions = self._versions.values()
        return min(versions, default=0), max(versions, default=0)

    def held_versions(self) -> tuple[int, int]:
        """On the host, answers are written into the model as they arrive."""
        buckets = self._buckets.values()
        arrive_in_model = all(each.host_parameters is each.parameters for each in buckets)
        return self._received_versions() if arrive_in_model else self._computed_with

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Leave the lead last, since its shards stop once every worker has left. Idempotent."""
        if self._closed:
            return
        self._closed = True
        others = [client for index, client in self._clients.items() if index != _LEAD]
        for client in reversed(others):
            _say_goodbye(partial(client.leave, farewell, failure))
        if self._clients and farewell is Farewell.FINISHED:
            _say_goodbye(self._lead.finish)
        if _LEAD in self._clients:
            _say_goodbye(partial(self._clients[_LEAD].leave, farewell, failure))
        elif self._clients and farewell is not Farewell.FINISHED:
            _say_goodbye(partial(self._give_up, farewell, failure))
        if self._heartbeat is not None:
            self._heartbeat.close()
        for client in self._clients.values():
            client.close()

    def _give_up(self, farewell: Farewell, failure: str) -> None:
        """Tell the lead that the replica is gone, which its first stage may be unable to: this one
        ends in the middle of a step.
        """
        what = Farewell.FATAL if farewell is Farewell.FATAL else Farewell.FAILED
        address = self._config.cluster.shards[_LEAD]
        lead = ShardClient(_LEAD, address, self._worker, self._config)
        try:
            lead.leave(what, failure or "preempted")
        finally:
            lead.close()

    # -- Peers -------------------------------------------------------------------------------------

    def idle(self) -> None:
        """Tell the lead."""
        self._lead.idle()

    def meet(self, arrival: Arrival) -> Meeting:
        """Wait for the lead's word, and for the parameters if others went further."""
        was_chosen = self._chosen
        gives = was_chosen and arrival.purpose in HANDS_OVER and not self._extras_are_final
        digests = self._values.load_extras() if gives else None
        met = self._wait_for_all(replace(arrival, hands_over=gives))
        if met.handed_over:
            self._values.take_extras(digests)
        elif met.chosen and not was_chosen:
            self._become_chosen()
        self._extras_are_final |= arrival.purpose is Purpose.CLOSE
        grant = dialogue.decode_grant(met.leases) if met.HasField("leases") else None
        return Meeting(met.step, tuple(met.means), met.chosen, grant, met.past)

    def _become_chosen(self) -> None:
        """The worker that was chosen before is lost, before or after it had its last word."""
        if self._extras_are_final:
            self._values.take_extras()
        else:
            self._values.keep_nothing()
            self._values.load_extras()

    def _wait_for_all(self, arrival: Arrival) -> shard_pb2.Met:
        # Parts may come before the word that announces them, from a shard that is faster.
        self._inbox.expect(self._part_numbers, arrival.step, meets=True)
        met = self._lead.meet(arrival)
        self._epoch, self._chosen = max(self._epoch, met.epoch), met.chosen
        if met.refreshed:
            self._inbox.wait_for_parts()
            self._take_over()
        return met

    # -- DataLeases --------------------------------------------------------------------------------

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Ask the lead."""
        self._lead.request_lease(loader, spec)

    def receive_lease(self) -> Grant:
        """The lead's answer."""
        return dialogue.decode_grant(self._lead.receive_lease())

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """Tell the lead."""
        self._lead.return_leases(leases, declined=declined)

    def holds_lease(self, lease: int) -> bool:
        """The lead takes leases only from workers that are gone."""
        return True

    # -- Optimizer state ---------------------------------------------------------------------------

    def read_state(self) -> StateByParameter:
        """Gather the slices of every shard. Raises JobFailedError when other workers keep stepping
        meanwhile.
        """
        state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in self._positions}
        versions = set()
        for client in self._clients.values():
            for response in self._values.pull(client, shard_pb2.CONTENT_STATE):
                if response.WhichOneof("message") == "version":
                    versions.add(response.version)
                else:
                    place_state(self._plan, state, response.state)
        if len(versions) > 1:
            raise JobFailedError(
                "the shards moved on while their optimizer state was read (versions "
                f"{sorted(versions)}): call "
                "state_dict() on a worker that takes part in every step, between its steps"
            )
        return state

    def write_state(self, state: StateByParameter) -> None:
        """Send each shard its slices; only the chosen worker's count, all others return at once."""
        if self._chosen:
            for client in self._clients.values():
                self._values.load(client, cut_state(self._plan, client.index, state))

    # -- Listener: called by the threads that read the streams -------------------------------------

    def receive(self, shard: int, response: PartFrame | shard_pb2.ExchangeResponse) -> None:
        """A message of a shard. Raises ProtocolError."""
        if isinstance(response, PartFrame):
            self._receive_part(shard, response)
            return
        if response.number and not self._clients[shard].answered(response.number):
            return
        match response.WhichOneof("message"):
            case "part":
                self._receive_part(shard, response.part)
            case "met":
                self._inbox.met(response.met)
            case "leases":
                self._inbox.granted(response.leases)
            case "refused":
                self._inbox.refused(response.refused)
            case other:
                raise ProtocolError(f"shard {shard} sends {other} on an open stream")

    def missing(self, shard: int) -> list[shard_pb2.ExchangeRequest | Frame]:
        """The begin and the pushes that were not answered; without a step, the parts that are still
        expected.
        """
        expected = self._inbox.expected
        here = [part.index for part in self._plan.parts_of_shard(shard) if part.index in expected]
        sent = self._sent.get(shard)
        if sent is None:
            fetch = shard_pb2.ExchangeRequest(fetch=shard_pb2.Fetch(parts=here))
            return [fetch] if here else []
        return [message for part, message in tuple(sent) if part is None or part in expected]

    def recovered(self, shard: int) -> None:
        """A stream is open again."""
        self._metrics.reconnected(shard)
        self._inbox.recovered(shard)

    def fail(self, shard: int, failure: ShardlineError, *, final: bool = True) -> None:
        """A stream is broken."""
        self._inbox.fail(shard, failure, final=final)

    def _receive_part(self, shard: int, message: PartFrame | tensor_pb2.Part) -> None:
        """Copy a part's parameters into their bucket, unless they are older than what is held."""
        if message.part >= len(self._plan.parts):
            raise ProtocolError(
                f"shard {shard} sends part {message.part}, which the plan does not have"
            )
        part = self._plan.parts[message.part]
        elements = codec.decode_elements(message, part)
        self._epoch = max(self._epoch, message.epoch)
        # In lockstep the clock is told only where the version does not tell: in answers to repeats.
        mark = message.clock or message.step if self._lockstep else message.clock
        if not self._inbox.wants(part.index, mark):
            return
        target = self._buckets[part.bucket].host_parameters
        target[part.start : part.start + part.length].copy_(elements)
        self._versions[part.index] = message.step
        self._metrics.pulled(shard, part.num_bytes)
        self._inbox.arrived(part.index, mark)


def _say_goodbye(say: Callable[[], None]) -> None:
    """To a shard that may be gone, or of a job that may have failed: then there is nobody to."""
    with contextlib.suppress(ShardlineError):
        say()
