"""ParameterServerExchange: gradients to the shards, parameters back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from ps_core import codec
from ps_core.buckets import Bucket
from ps_core.codec import PartFrame
from ps_core.config import Config
from ps_core.errors import JobFailedError, MismatchError, ProtocolError, ShardlineError
from ps_core.exchange import Meeting, Outcome, Purpose, ReadExtras, Start, StateByParameter, Traffic
from ps_core.job import Job
from ps_core.memory import keep_freed_memory
from ps_core.metrics import WorkerMetrics
from ps_core.optim_spec import SCALAR_STATE, Hyperparameters, OptimizerSpec
from ps_core.plan import Part, Plan
from ps_core.v1 import shard_pb2, tensor_pb2
from ps_worker.client import ShardClient
from ps_worker.inbox import Inbox


class ParameterServerExchange:
    """One worker's side of all shards. Public methods are for the training thread.

    Each shard's reader thread writes answers straight into the buckets' host parameters while the
    training thread waits in `settle`.
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
        self._epoch = 0
        self._chosen = False
        self._abstained = False
        self._closed = False
        self._kept_extras: dict[str, tuple[int, int]] = {}

    # -- Exchange ----------------------------------------------------------------------------------

    def join(
        self, plan: Plan, buckets: Sequence[Bucket], optimizer: OptimizerSpec, extras: ReadExtras
    ) -> Start:
        """Enter the job on every shard and take its values. Blocks until all workers have joined.

        Raises ShardUnreachableError, MismatchError, DataLossError or JobFailedError, each within
        its timeout.
        """
        keep_freed_memory()
        self._plan, self._buckets, self._extras = plan, buckets, extras
        self._parts = {b.layout.index: plan.parts_of_bucket(b.layout.index) for b in buckets}
        self._positions = {
            placement.parameter: (bucket, position)
            for bucket in buckets
            for position, placement in enumerate(bucket.layout.placements)
        }
        message = codec.encode_job(self._describe_job(plan, optimizer))
        for client in self._clients:
            client.connect()
        first, *_ = [client.join(message) for client in self._clients]
        for client in self._clients:
            client.open(self._receive_from(client.index), self._inbox.fail)
        if first:
            self._load_initial()
        meeting = self._wait_for_all(Purpose.START, 0, (), 1.0)
        if not first:
            self._pull_parameters()
            self._pull_extras()
        return Start(meeting.step, meeting.chosen)

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
            mode=config.consistency.mode,
            deterministic=config.consistency.deterministic,
        )

    def begin(self, step: int, samples: int, hyperparameters: Sequence[Hyperparameters]) -> None:
        """Tell every shard that holds parts, which answers all of them, also to one that abstains.

        A shard without parts has no answer to wait for: what it heard could be overtaken by news.
        """
        self._abstained = samples == 0
        self._inbox.expect(part.index for part in self._plan.parts)
        begin = shard_pb2.Begin(
            step=step,
            epoch=self._epoch,
            samples=samples,
            groups=codec.encode_groups(hyperparameters),
        )
        for shard in {part.shard for part in self._plan.parts}:
            self._clients[shard].send(shard_pb2.ExchangeRequest(begin=begin))

    def submit(self, bucket: Bucket, step: int) -> None:
        """Queue the bucket's parts for their shards; copies the gradients once."""
        bucket.download()
        for part in self._parts[bucket.layout.index]:
            present = [bucket.present[self._positions[s.parameter][1]] for s in part.slices]
            frame = codec.encode_push(step, part, present, bucket.host_gradients)
            self._clients[part.shard].send(frame)
            self._metrics.pushed(part.shard, part.num_bytes)
            self.traffic.pushed_bytes += part.num_bytes

    def settle(self, step: int) -> Outcome:
        """Wait for every part. The shards bound the wait: they end the streams when a worker or
        shard is lost.
        """
        self._inbox.wait_for_parts()
        self.traffic.pulled_bytes += sum(part.num_bytes for part in self._plan.parts)
        for bucket in self._buckets:
            bucket.upload()
        return Outcome(version=step + 1, applied=not self._abstained, staleness=0)

    def close(self, failure: str = "") -> None:
        """Leave the lead last, since its shards stop once every worker has left. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for client in reversed(self._clients):
            try:
                client.leave(failure)
            except ShardlineError:
                # The shard is gone or the job has failed: there is nobody to say goodbye to.
                continue
        for client in self._clients:
            client.close()

    # -- Peers -------------------------------------------------------------------------------------

    def idle(self, step: int) -> None:
        """Tell the lead."""
        idle = shard_pb2.Idle(step=step)
        self._clients[0].send(shard_pb2.ExchangeRequest(idle=idle))

    def meet(
        self, purpose: Purpose, step: int, values: Sequence[float] = (), weight: float = 1.0
    ) -> Meeting:
        """Wait for the lead's word, then pull the parameters if others went further."""
        if self._chosen and purpose in (Purpose.EPOCH, Purpose.CLOSE):
            self._load_extras()
        meeting = self._wait_for_all(purpose, step, values, weight)
        if meeting.step != step:
            self._pull_parameters()
        return meeting

    def _wait_for_all(
        self, purpose: Purpose, step: int, values: Sequence[float], weight: float
    ) -> Meeting:
        meet = shard_pb2.Meet(
            purpose=shard_pb2.Purpose.Name(purpose), step=step, values=values, weight=weight
        )
        self._clients[0].send(shard_pb2.ExchangeRequest(meet=meet))
        met = self._inbox.wait_for_meeting()
        self._epoch, self._chosen = met.epoch, met.chosen
        return Meeting(met.step, tuple(met.means), met.chosen)

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
                    self._place_state(state, response.state)
        if len(versions) > 1:
            raise JobFailedError(
                "the shards moved on while their optimizer state was read (versions "
                f"{sorted(versions)}): call "
                "state_dict() on a worker that takes part in every step, between its steps"
            )
        return state

    def _place_state(
        self, state: Mapping[int, dict[str, torch.Tensor]], message: tensor_pb2.StateTensor
    ) -> None:
        piece = self._plan.parts[message.part].slices[message.slice]
        value, entries = codec.decode_state(message), state[piece.parameter]
        if value.dim() == 0:
            entries[message.spec.name] = value
            return
        shape = self._plan.parameters[piece.parameter].shape
        whole = entries.setdefault(message.spec.name, torch.zeros(shape, dtype=value.dtype))
        whole.view(-1)[piece.start : piece.start + piece.length] = value

    def write_state(self, state: StateByParameter) -> None:
        """Send each shard its slices; only the chosen worker's count, all others return at once."""
        if self._chosen:
            for client in self._clients:
                self._load(client, self._cut_state(client.index, state))

    def _cut_state(self, shard: int, state: StateByParameter) -> Iterator[shard_pb2.LoadRequest]:
        yield shard_pb2.LoadRequest(clear_state=True)
        for part in self._plan.parts_of_shard(shard):
            for number, piece in enumerate(part.slices):
                for key, value in state.get(piece.parameter, {}).items():
                    if key not in SCALAR_STATE:
                        value = value.reshape(-1)[piece.start : piece.start + piece.length]
                    message = codec.encode_state(part.index, number, key, value.cpu())
                    yield shard_pb2.LoadRequest(state=message)

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

    def _pull_parameters(self) -> None:
        for client in self._clients:
            for response in self._pull(client, shard_pb2.CONTENT_PARAMETERS):
                if response.WhichOneof("message") == "part":
                    self._write(client.index, response.part)
        for bucket in self._buckets:
            bucket.upload()

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

    def _receive_from(self, shard: int) -> Callable[[PartFrame | shard_pb2.ExchangeResponse], None]:
        def receive(response: PartFrame | shard_pb2.ExchangeResponse) -> None:
            if isinstance(response, PartFrame):
                self._inbox.arrived(self._write(shard, response).index)
                return
            match response.WhichOneof("message"):
                case "part":
                    self._inbox.arrived(self._write(shard, response.part).index)
                case "met":
                    self._inbox.met(response.met)
                case other:
                    raise ProtocolError(f"shard {shard} sends {other} on an open stream")

        return receive

    def _write(self, shard: int, message: PartFrame | tensor_pb2.Part) -> Part:
        """Copy a part's parameters into their bucket."""
        if message.part >= len(self._plan.parts):
            raise ProtocolError(
                f"shard {shard} sends part {message.part}, which the plan does not have"
            )
        part = self._plan.parts[message.part]
        target = self._buckets[part.bucket].host_parameters
        target[part.start : part.start + part.length].copy_(codec.decode_elements(message, part))
        self._metrics.pulled(shard, part.num_bytes)
        return part
