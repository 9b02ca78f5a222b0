"""ParameterServerExchange: gradients to the shards, parameters back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ps_core import codec, dialogue
from ps_core.buckets import Bucket
from ps_core.codec import PartFrame
from ps_core.errors import JobFailedError, MismatchError, ProtocolError, ShardlineError
from ps_core.exchange import (
    Arrival,
    Farewell,
    Grant,
    Meeting,
    Outcome,
    Purpose,
    ReadExtras,
    Start,
    StateByParameter,
    Traffic,
    Work,
)
from ps_core.heartbeat import Heartbeat
from ps_core.job import Job
from ps_core.leases import PassSpec
from ps_core.memory import keep_freed_memory
from ps_core.metrics import WorkerMetrics
from ps_core.optim_spec import Hyperparameters, OptimizerSpec
from ps_core.plan import Plan
from ps_core.settings import Config
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.client import ShardClient
from ps_worker.inbox import Inbox
from ps_worker.state import cut_state, place_state


class ParameterServerExchange:
    """One worker's side of all shards. Public methods are for the training thread.

    Each shard's reader thread writes answers straight into the buckets' host parameters while the
    training thread waits in `settle`, or in a meeting.
    """

    def __init__(self, config: Config, metrics: WorkerMetrics) -> None:
        """Does not connect yet."""
        self._config = config
        self._metrics = metrics
        rank, incarnation = config.cluster.rank, secrets.randbits(63) + 1
        worker = shard_pb2.WorkerId(rank=rank, incarnation=incarnation)
        self._clients = [
            ShardClient(index, address, worker, config)
            for index, address in enumerate(config.cluster.shards)
        ]
        self.traffic = Traffic()
        self._inbox = Inbox()
        self._heartbeat: Heartbeat | None = None
        self._lockstep = config.consistency.mode in ("sync", "local")
        self._epoch = 0
        self._versions: dict[int, int] = {}
        """Of each part held."""
        self._base: dict[int, int] = {}
        """The versions that the open step's gradients were computed from."""
        self._sent: dict[int, list[tuple[int | None, shard_pb2.ExchangeRequest | bytes]]] = {}
        """Shard → the messages of the open step: its begin, then pushes with the part's index."""
        self._chosen = False
        self._abstained = False
        self._closed = False
        self._kept_extras: dict[str, tuple[int, int]] = {}

    def leave_when(self, is_preempted: Callable[[], bool]) -> None:
        """Ask this in every wait that may be left, and raise Preempted when it is true."""
        self._inbox.is_preempted = is_preempted

    # -- Exchange ----------------------------------------------------------------------------------

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: ReadExtras
    ) -> Start:
        """Enter the job on every shard and take its values. Blocks until all workers have joined,
        or until the others let this one into a running job.

        Raises ShardUnreachableError, MismatchError, DataLossError or JobFailedError, each within
        its timeout; JobOverError when there is nothing left to do.
        """
        keep_freed_memory()
        self._plan, self._buckets, self._extras = plan, buckets, extras
        self._parts = {b.layout.index: plan.parts_of_bucket(b.layout.index) for b in buckets}
        self._part_numbers = range(len(plan.parts))
        self._versions = dict.fromkeys(self._part_numbers, 0)
        self._holders = sorted({part.shard for part in plan.parts})
        self._positions = {
            placement.parameter: (bucket, position)
            for bucket in buckets
            for position, placement in enumerate(bucket.layout.placements)
        }
        message = codec.encode_job(self._describe_job(plan, optimizer))
        for client in self._clients:
            client.connect()
        first, *_ = [client.join(message) for client in self._clients]  # the lead comes first
        for client in self._clients:
            client.open(self)
        self._heartbeat = Heartbeat(self._config.membership.heartbeat_seconds, self._beat)
        if first:
            self._load_initial()
        met = self._wait_for_all(Arrival(Purpose.START, 0))
        if met.refreshed:
            self._pull_extras()
        position = dialogue.decode_position(met.position) if met.HasField("position") else None
        return Start(met.step, met.chosen, position)

    def _describe_job(self, plan: Plan, optimizer: OptimizerSpec) -> Job:
        config = self._config
        return Job(
            job_id=config.job.id,
            num_workers=config.cluster.num_workers,
            num_shards=len(config.cluster.shards),
            parameters=plan.parameters,
            part_bytes=config.exchange.part_bytes,
            bucket_bytes=config.exchange.bucket_bytes,
            optimizer=optimizer,
            consistency=config.consistency,
        )

    def _beat(self) -> None:
        self._clients[0].send(shard_pb2.ExchangeRequest(heartbeat=shard_pb2.Heartbeat()))

    def begin(self, step: int, work: Work, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Tell every shard that holds parts, which answers all of them, also to one that abstains.

        A shard without parts has no answer to wait for: what it heard could be overtaken by news.
        """
        self._abstained = work.samples == 0
        self._inbox.expect(self._part_numbers, step + 1)
        begin = dialogue.encode_begin(step, self._epoch, work, hyperparameters)
        request = shard_pb2.ExchangeRequest(begin=begin)
        self._sent = {shard: [(None, request)] for shard in self._holders}
        if not self._lockstep:  # now: answers may come before `settle`
            self._base = dict(self._versions)
        for shard in self._holders:
            self._clients[shard].send(request)

    def submit(self, bucket: Bucket, step: int) -> None:
        """Queue the bucket's parts for their shards; copies the gradients once."""
        bucket.download()
        for part in self._parts[bucket.layout.index]:
            present = [bucket.present[self._positions[s.parameter][1]] for s in part.slices]
            frame = codec.encode_push(step, part, present, bucket.host_gradients)
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
        self.traffic.pulled_bytes += sum(part.num_bytes for part in self._plan.parts)
        for bucket in self._buckets:
            bucket.upload()

    def close(self, farewell: Farewell = Farewell.FINISHED, failure: str = "") -> None:
        """Leave the lead last, since its shards stop once every worker has left. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for client in reversed(self._clients):
            try:
                client.leave(farewell, failure)
            except ShardlineError:
                # The shard is gone or the job has failed: there is nobody to say goodbye to.
                continue
        if self._heartbeat is not None:
            self._heartbeat.close()
        for client in self._clients:
            client.close()

    # -- Peers -------------------------------------------------------------------------------------

    def idle(self) -> None:
        """Tell the lead."""
        self._clients[0].request(shard_pb2.ExchangeRequest(idle=shard_pb2.Idle()))

    def meet(self, arrival: Arrival) -> Meeting:
        """Wait for the lead's word, and for the parameters if others went further."""
        if self._chosen and arrival.purpose in (Purpose.EPOCH, Purpose.CLOSE):
            self._load_extras()
        met = self._wait_for_all(arrival)
        grant = dialogue.decode_grant(met.leases) if met.HasField("leases") else None
        return Meeting(met.step, tuple(met.means), met.chosen, grant, met.past)

    def _wait_for_all(self, arrival: Arrival) -> shard_pb2.Met:
        # Parts may come before the word that announces them, from a shard that is faster.
        self._inbox.expect(self._part_numbers, arrival.step, meets=True)
        meet = dialogue.encode_meet(arrival)
        self._clients[0].request(shard_pb2.ExchangeRequest(meet=meet))
        met = self._inbox.wait_for_meeting()
        self._epoch, self._chosen = max(self._epoch, met.epoch), met.chosen
        if met.refreshed:
            self._inbox.wait_for_parts()
            self._take_over()
        return met

    # -- DataLeases --------------------------------------------------------------------------------

    def request_lease(self, loader: int, spec: PassSpec) -> None:
        """Ask the lead."""
        lease = dialogue.encode_lease_request(loader, spec)
        self._clients[0].request(shard_pb2.ExchangeRequest(lease=lease))

    def receive_lease(self) -> Grant:
        """The lead's answer."""
        return dialogue.decode_grant(self._inbox.wait_for_leases())

    def return_leases(self, leases: Sequence[int], *, declined: bool = False) -> None:
        """Tell the lead."""
        lease = shard_pb2.LeaseRequest(returned=leases, declined=declined)
        self._clients[0].request(shard_pb2.ExchangeRequest(lease=lease))

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
        for client in self._clients:
            for response in self._pull(client, shard_pb2.CONTENT_STATE):
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
            for client in self._clients:
                self._load(client, cut_state(self._plan, client.index, state))

    # -- Values ------------------------------------------------------------------------------------

    def _load_initial(self) -> None:
        for client in self._clients:
            parts = self._plan.parts_of_shard(client.index)
            self._load(
                client,
                (codec.encode_initial(p, self._buckets[p.bucket].host_parameters) for p in parts),
            )
        self._load_extras()

    def _load_extras(self) -> None:
        """Send the lead what has changed since the last time."""
        changed = {}
        for name, tensor in self._extras().items():
            mark = (tensor.data_ptr(), tensor._version)
            if self._kept_extras.get(name) != mark:
                self._kept_extras[name], changed[name] = mark, tensor
        chunks = (
            shard_pb2.LoadRequest(buffer=chunk)
            for name, tensor in changed.items()
            for chunk in codec.encode_chunks(name, tensor.detach().cpu())
        )
        self._load(self._clients[0], chunks)

    def _load(self, client: ShardClient, messages: Iterable[shard_pb2.LoadRequest | bytes]) -> None:
        with self._inbox.explaining(2 * self._config.rpc.reconnect_seconds):
            client.load(messages)

    def _pull(
        self, client: ShardClient, content: shard_pb2.Content
    ) -> Iterator[shard_pb2.PullResponse]:
        with self._inbox.explaining(2 * self._config.rpc.reconnect_seconds):
            yield from client.pull(content)

    def _pull_extras(self) -> None:
        extras = self._extras()
        received = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in extras.items()}
        missing = set(received)
        for response in self._pull(self._clients[0], shard_pb2.CONTENT_BUFFERS):
            if response.WhichOneof("message") == "buffer":
                name = response.buffer.spec.name
                if name not in received:
                    raise MismatchError(
                        f"the job's model has {name!r}, which this worker's model lacks: build "
                        "the same model on every worker"
                    )
                codec.write_chunk(response.buffer, received[name])
                missing.discard(name)
        if missing:
            raise MismatchError(
                f"this worker's model has {sorted(missing)}, which the job's model lacks: build "
                "the same model on every worker"
            )
        with torch.no_grad():
            for name, tensor in extras.items():
                tensor.copy_(received[name])

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

    def missing(self, shard: int) -> list[shard_pb2.ExchangeRequest | bytes]:
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
