"""What a shard answers over real gRPC: to tools, to whoever does not fit, and to what is malformed.

Two shards serve one job for the whole file. Every test ends with a step of that job: whatever was
refused, its workers go on, with the right values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from ps_core import codec, dialogue
from ps_core.leases import PassSpec
from ps_core.optim_spec import OptimizerSpec
from ps_core.plan import ParameterSpec
from ps_core.settings import ConsistencyConfig
from ps_core.v1 import lead_pb2, shard_pb2, tensor_pb2
from ps_core.v1.shard_pb2 import ExchangeRequest, JobSpec, LoadRequest
from tests.processes import PATIENCE_SECONDS, Fleet, Process
from tests.wire import Frame, HandJob, Wire, as_bytes

MIB = 2**20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings = {"rpc.reconnect_seconds": 60}  # a test that fails leaves a stream closed for a while
    with Fleet(folder, num_shards=2, num_workers=2, settings=settings) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shards(fleet: Fleet) -> list[Process]:
    return fleet.shards()


@pytest.fixture(scope="module")
def started(fleet: Fleet, shards: list[Process]) -> Iterator[HandJob]:
    job = HandJob(fleet)
    job.start()
    job.step()
    yield job
    job.close()


@pytest.fixture
def job(started: HandJob, shards: list[Process]) -> Iterator[HandJob]:
    """A job that trains before the test and after it; the test may spoil worker 0's streams."""
    yield started
    for shard, wire in enumerate(started.wires):
        started.open(0, shard)
        assert wire.is_serving()
        assert wire.describe().phase == shard_pb2.PHASE_TRAINING
        assert "Traceback" not in shards[shard].output
    started.step()


def lead(job: HandJob) -> Wire:
    return job.wires[0]


# -- Tools -----------------------------------------------------------------------------------------


def reflect(wire: Wire, request: reflection_pb2.ServerReflectionRequest) -> bytes:
    stub: grpc.StreamStreamMultiCallable[Frame, bytes] = wire.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", as_bytes
    )
    [answer] = stub(iter([request]), timeout=PATIENCE_SECONDS)
    return answer


@pytest.mark.parametrize("shard", [0, 1])
def test_reflection_lists_the_services_that_a_shard_has(job: HandJob, shard: int) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = reflection_pb2.ServerReflectionResponse.FromString(reflect(job.wires[shard], request))
    names = {service.name for service in answer.list_services_response.service}
    tools = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    of_the_lead = {"ps_core.v1.LeadService"} if shard == 0 else set()
    assert names == {"ps_core.v1.ShardService"} | tools | of_the_lead


def test_reflection_describes_the_contract(job: HandJob) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="ps_core.v1.JobSpec")
    answer = reflection_pb2.ServerReflectionResponse.FromString(reflect(lead(job), request))
    files = map(
        FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto
    )
    assert "ps_core/v1/shard.proto" in {file.name for file in files}


def test_describe_tells_who_takes_part(job: HandJob, shards: list[Process]) -> None:
    job.step()
    for shard, wire in enumerate(job.wires):
        told = wire.describe()
        assert (told.shard, told.pid, told.job_id) == (shard, shards[shard].pid, "shardline")
        assert told.num_parts == len(job.parts_of(shard))
        assert told.parameter_bytes == sum(part.num_bytes for part in job.parts_of(shard))
        assert told.version == job.next_step
        assert [(w.worker.rank, w.host, w.state) for w in told.workers] == [
            (0, "hand", "member"),
            (1, "hand", "member"),
        ]
        assert {w.clock for w in told.workers} == {job.next_step}


def test_health_checks_see_a_shard_that_drains(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        shard = fleet.shard(0)
        wire = Wire(fleet.addresses[0])
        assert wire.is_serving()
        watch = wire.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=as_bytes,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        shard.send(SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert shard.wait() == 0
        wire.close()


# -- Who does not fit ------------------------------------------------------------------------------

WEIGHT = ParameterSpec("weight", torch.float32, (25, 40), 0)
BIAS = ParameterSpec("bias", torch.float32, (24,), 0)
SGD = OptimizerSpec("SGD", ({"lr": 0.25},))

DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"parameters": (replace(WEIGHT, name="kernel"), BIAS)},
        "parameter 0 is 'weight float32[25, 40] in group 0' here "
        "and 'kernel float32[25, 40] in group 0' there",
    ),
    "shape": ({"parameters": (replace(WEIGHT, shape=(40, 25)), BIAS)}, "'weight float32[40, 25] "),
    "dtype": ({"parameters": (WEIGHT, replace(BIAS, dtype=torch.float64))}, "'bias float64[24] "),
    "group": (
        {
            "parameters": (WEIGHT, replace(BIAS, group=1)),
            "optimizer": replace(SGD, groups=({"lr": 0.25}, {"lr": 0.25})),
        },
        "'bias float32[24] in group 1' there",
    ),
    "missing": ({"parameters": (WEIGHT,)}, "parameter 1 is 'bias float32[24] in group 0' here and"),
    "optimizer": (
        {"optimizer": replace(SGD, name="Adagrad")},
        "optimizer is 'SGD' here and 'Adagrad' there",
    ),
    "lr": (
        {"optimizer": replace(SGD, groups=({"lr": 0.5},))},
        "lr of parameter group 0 is 0.25 here and 0.5 there",
    ),
    "momentum": (
        {"optimizer": replace(SGD, groups=({"lr": 0.25, "momentum": 0.9},))},
        "momentum of parameter group 0 is None here and 0.9 there",
    ),
    "clipping": (
        {"optimizer": replace(SGD, max_grad_norm=1.0)},
        "max_grad_norm is None here and 1.0 there",
    ),
    "num_workers": ({"num_workers": 1}, "num workers is 2 here and 1 there"),
    "more workers": ({"num_workers": 3}, "the job starts with 3 workers and shard 0 admits 2"),
    "num_shards": ({"num_shards": 3}, "number of shards is 2 on shard 0 and 3 on the worker"),
    "protocol": ({"protocol": 1}, "protocol is 2 on shard 0 and 1 on the worker"),
    "job_id": ({"job_id": "else"}, "job id is 'shardline' on shard 0 and 'else' on the worker"),
    "mode": (
        {"consistency": ConsistencyConfig("async")},
        "mode is 'sync' on shard 0 and 'async' on the worker",
    ),
    "backup_workers": (
        {"consistency": ConsistencyConfig(backup_workers=1)},
        "backup workers is 0 here and 1 there",
    ),
    "deterministic": (
        {"consistency": ConsistencyConfig(deterministic=True)},
        "deterministic is False here and True there",
    ),
    "part_bytes": ({"part_bytes": 1024}, "part_bytes is 512 here and 1024 there"),
    "bucket_bytes": ({"bucket_bytes": 2**21}, "bucket_bytes is 1048576 here and 2097152 there"),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_worker_that_disagrees_about_the_job_is_told_the_first_difference(
    job: HandJob, what: str
) -> None:
    changes, difference = DISAGREEMENTS[what]
    request = job.request(rank=0, shard=0)
    request.job.CopyFrom(codec.encode_job(replace(job.spec, **changes)))
    code, text = lead(job).refusal("Join", request)
    assert code is StatusCode.FAILED_PRECONDITION
    assert difference in text


def test_a_worker_whose_plan_comes_out_different_is_refused(job: HandJob) -> None:
    request = job.request(rank=0, shard=0)
    request.job.fingerprint = "0" * 64
    assert lead(job).refusal("Join", request) == (
        StatusCode.FAILED_PRECONDITION,
        "two processes make different plans of the same job: run the same release everywhere",
    )


def test_a_worker_that_has_swapped_the_addresses_is_told_which_shard_this_is(job: HandJob) -> None:
    assert lead(job).refusal("Join", job.request(rank=0, shard=1)) == (
        StatusCode.FAILED_PRECONDITION,
        "this is shard 0, not 1: list the shards in index order",
    )


def test_a_rank_beyond_the_job_is_refused(job: HandJob) -> None:
    request = job.request(rank=0, shard=0)
    request.worker.rank = 2
    assert lead(job).refusal("Join", request) == (
        StatusCode.FAILED_PRECONDITION,
        "worker 2 joins a job of at most 2 workers: allow more with cluster.max_workers "
        "(--workers MIN:MAX)",
    )


def test_a_worker_that_knows_another_incarnation_of_the_shard_is_not_let_in(job: HandJob) -> None:
    request = job.request(rank=1, shard=0)
    request.expected_shard_incarnation = lead(job).describe().incarnation ^ 1
    assert lead(job).refusal("Join", request) == (
        StatusCode.DATA_LOSS,
        "shard 0 restarted and lost its state: start the job again",
    )


def test_the_same_process_may_join_again(job: HandJob) -> None:
    first, again = (
        shard_pb2.JoinResponse.FromString(lead(job).call("Join", job.request(0, 0))[0])
        for _ in range(2)
    )
    assert first == again
    assert not first.gives_initial_values  # the job has them already


STRANGER = shard_pb2.WorkerId(rank=0, incarnation=1)


@pytest.mark.parametrize(
    ("method", "frame"),
    [
        ("Exchange", ExchangeRequest(hello=shard_pb2.Hello(worker=STRANGER))),
        ("Load", LoadRequest(hello=shard_pb2.Hello(worker=STRANGER))),
        ("Pull", shard_pb2.PullRequest(worker=STRANGER, content=shard_pb2.CONTENT_PARAMETERS)),
        ("Leave", shard_pb2.LeaveRequest(worker=STRANGER, failure="because")),
    ],
)
def test_a_stranger_is_refused(job: HandJob, method: str, frame: Frame) -> None:
    assert lead(job).refusal(method, frame) == (
        StatusCode.FAILED_PRECONDITION,
        "worker 0 has not joined this shard",
    )


# -- A job that cannot be --------------------------------------------------------------------------


def set_unknown_dtype(job: JobSpec) -> None:
    job.parameters[0].tensor.dtype = 99  # type: ignore[assignment]  # proto3 enums are open


def set_integer_dtype(job: JobSpec) -> None:
    job.parameters[0].tensor.dtype = tensor_pb2.DATA_TYPE_INT64


def set_negative_size(job: JobSpec) -> None:
    job.parameters[0].tensor.shape[0] = -25


def set_unknown_group(job: JobSpec) -> None:
    job.parameters[0].group = 1


def set_no_parameters(job: JobSpec) -> None:
    del job.parameters[:]


def set_no_workers(job: JobSpec) -> None:
    job.num_workers = 0


def set_odd_part_bytes(job: JobSpec) -> None:
    job.part_bytes = 500


def set_unknown_optimizer(job: JobSpec) -> None:
    job.optimizer.name = "LBFGS"


def set_empty_hyperparameter(job: JobSpec) -> None:
    job.optimizer.groups[0].values["lr"].Clear()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (set_unknown_dtype, "unknown element type 99"),
        (set_integer_dtype, "parameter 'weight' has a bad dtype, shape or group"),
        (set_negative_size, "parameter 'weight' has a bad dtype, shape or group"),
        (set_unknown_group, "parameter 'weight' has a bad dtype, shape or group"),
        (set_no_parameters, "a job needs workers, shards and parameters"),
        (set_no_workers, "a job needs workers, shards and parameters"),
        (set_odd_part_bytes, "part_bytes 500 is not a positive multiple of 512"),
        (set_unknown_optimizer, "unknown optimizer 'LBFGS'"),
        (set_empty_hyperparameter, "hyperparameter lr has no value"),
    ],
)
def test_a_job_that_cannot_be_is_refused(
    job: HandJob, spoil: Callable[[JobSpec], None], text: str
) -> None:
    request = job.request(rank=0, shard=0)
    spoil(request.job)
    assert lead(job).refusal("Join", request) == (StatusCode.INVALID_ARGUMENT, text)


# -- What a stream refuses -------------------------------------------------------------------------


def push(*, part: int, step: int, num_bytes: int = 512) -> ExchangeRequest:
    data = bytes(num_bytes)
    return ExchangeRequest(part=tensor_pb2.Part(part=part, step=step, data=data))


def here(job: HandJob) -> int:
    """A part of shard 1."""
    return job.parts_of(1)[0].index


def early_begin(job: HandJob) -> ExchangeRequest:
    frame = job.begin(0)
    frame.begin.step += 1
    return frame


def begin_without_lr(job: HandJob) -> ExchangeRequest:
    frame = job.begin(0)
    del frame.begin.groups[:]
    return frame


REFUSED: dict[str, tuple[Callable[[HandJob], list[Frame]], str]] = {
    "a second hello": (
        lambda job: [ExchangeRequest(hello=job.hello(0))],
        "worker 0 sends hello on an open stream",
    ),
    "an empty message": (lambda job: [b""], "worker 0 sends None on an open stream"),
    "no message": (lambda job: [b"\xff\xff"], "2 bytes that are no ExchangeRequest"),
    "a truncated push": (
        lambda job: [job.pushes(0, 1)[0][:-1]],
        "{size} bytes that are no ExchangeRequest",
    ),
    "a short part": (
        lambda job: [job.begin(0), push(part=here(job), step=job.next_step, num_bytes=508)],
        "part 1 has 508 bytes where the plan says 512",
    ),
    "a long part": (
        lambda job: [job.begin(0), push(part=here(job), step=job.next_step, num_bytes=516)],
        "part 1 has 516 bytes where the plan says 512",
    ),
    "an unknown part": (
        lambda job: [job.begin(0), push(part=1000, step=job.next_step)],
        "part 1000 is not on this shard",
    ),
    "a part of another shard": (
        lambda job: [job.begin(0), push(part=0, step=job.next_step)],
        "part 0 is not on this shard",
    ),
    "a push without a begin": (
        lambda job: [push(part=here(job), step=job.next_step)],
        "worker 0 pushes part 1 of step {step} without a begin",
    ),
    "a push of another step": (
        lambda job: [job.begin(0), push(part=here(job), step=job.next_step + 1)],
        "worker 0 pushes part 1 of step {next} without a begin",
    ),
    "an early begin": (
        lambda job: [early_begin(job)],
        "worker 0 begins step {next} at version {step}",
    ),
    "a begin without hyperparameters": (
        lambda job: [begin_without_lr(job)],
        "worker 0 sends hyperparameters that the optimizer does not have",
    ),
    "an idle worker": (
        lambda job: [ExchangeRequest(idle=shard_pb2.Idle(), number=1)],
        "shard 1 is not the lead: meetings go to shard 0",
    ),
    "a meeting": (
        lambda job: [
            ExchangeRequest(meet=shard_pb2.Meet(purpose=shard_pb2.PURPOSE_MEAN), number=1)
        ],
        "shard 1 is not the lead: meetings go to shard 0",
    ),
    "a wish for samples": (
        lambda job: [ExchangeRequest(lease=shard_pb2.LeaseRequest(), number=1)],
        "shard 1 is not the lead: meetings go to shard 0",
    ),
    "a heartbeat": (
        lambda job: [ExchangeRequest(heartbeat=shard_pb2.Heartbeat())],
        "shard 1 is not the lead: meetings go to shard 0",
    ),
    "a begin beyond all training": (
        lambda job: [ExchangeRequest(begin=shard_pb2.Begin(step=2**64 - 1))],
        "step 18446744073709551615 is beyond all training",
    ),
    "a begin with very many leases": (
        lambda job: [ExchangeRequest(begin=shard_pb2.Begin(leases=[1] * 10**6))],
        "1000000 leases cannot be behind one step",
    ),
    "a fetch of an unknown part": (
        lambda job: [ExchangeRequest(fetch=shard_pb2.Fetch(parts=[1000]))],
        "part 1000 is not on this shard",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_stream_ends_with_what_was_wrong(job: HandJob, what: str) -> None:
    frames, text = REFUSED[what]
    stream = [ExchangeRequest(hello=job.hello(0)), *frames(job)]
    refusal = job.wires[1].refusal("Exchange", *stream)
    expected = text.format(
        step=job.next_step, next=job.next_step + 1, size=len(as_bytes(stream[-1]))
    )
    assert refusal == (StatusCode.INVALID_ARGUMENT, expected)


def test_what_was_wrong_arrives_behind_an_answer_that_is_being_written(job: HandJob) -> None:
    job.next_step -= 1
    repeated = [job.begin(0), ExchangeRequest.FromString(job.pushes(0, 1)[0])]
    job.next_step += 1
    frames = [ExchangeRequest(hello=job.hello(0)), *repeated, ExchangeRequest()]
    for _ in range(50):
        assert job.wires[1].refusal("Exchange", *frames) == (
            StatusCode.INVALID_ARGUMENT,
            "worker 0 sends None on an open stream",
        )


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_numbers_cannot_be_averaged_with_such_a_weight(job: HandJob, weight: float) -> None:
    meet = shard_pb2.Meet(purpose=shard_pb2.PURPOSE_MEAN, step=job.next_step, weight=weight)
    hello, request = ExchangeRequest(hello=job.hello(0)), ExchangeRequest(meet=meet)
    code, text = lead(job).refusal("Exchange", hello, job.numbered(0, request))
    assert code is StatusCode.INVALID_ARGUMENT
    assert text == f"numbers cannot be averaged with weight {weight}"


@pytest.mark.parametrize("purpose", [0, 99])
def test_a_meeting_needs_a_purpose(job: HandJob, purpose: int) -> None:
    meet = shard_pb2.Meet(purpose=purpose)  # type: ignore[arg-type]  # proto3 enums are open
    hello, request = ExchangeRequest(hello=job.hello(0)), ExchangeRequest(meet=meet)
    assert lead(job).refusal("Exchange", hello, job.numbered(0, request)) == (
        StatusCode.INVALID_ARGUMENT,
        f"unknown purpose {purpose} of a meeting",
    )


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_a_request_to_the_lead_that_is_out_of_turn_is_refused(job: HandJob, number: int) -> None:
    hello = ExchangeRequest(hello=job.hello(0))
    request = ExchangeRequest(idle=shard_pb2.Idle(), number=number)
    code, text = lead(job).refusal("Exchange", hello, request)
    assert code is StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"worker 0 sends request {number} after request ")


def test_a_pass_that_cannot_be_is_refused(job: HandJob) -> None:
    request = ExchangeRequest(lease=dialogue.encode_lease_request(0, PassSpec(2**63, 8)))
    hello = ExchangeRequest(hello=job.hello(0))
    assert lead(job).refusal("Exchange", hello, job.numbered(0, request)) == (
        StatusCode.INVALID_ARGUMENT,
        "a pass over 9223372036854775808 samples never ends",
    )


def test_leases_that_a_worker_does_not_hold_are_refused(job: HandJob) -> None:
    request = ExchangeRequest(lease=shard_pb2.LeaseRequest(returned=[2**64 - 1]))
    hello = ExchangeRequest(hello=job.hello(0))
    assert lead(job).refusal("Exchange", hello, job.numbered(0, request)) == (
        StatusCode.INVALID_ARGUMENT,
        "worker 0 names lease 18446744073709551615, which it does not hold",
    )


@pytest.mark.parametrize(
    ("method", "frames"),
    [
        ("Exchange", []),
        ("Exchange", [ExchangeRequest(idle=shard_pb2.Idle(), number=1)]),
        ("Exchange", [push(part=0, step=0)]),
        ("Load", []),
        ("Load", [LoadRequest(part=tensor_pb2.Part())]),
    ],
)
def test_a_stream_without_a_hello_is_refused(
    job: HandJob, method: str, frames: list[Frame]
) -> None:
    assert lead(job).refusal(method, *frames) == (
        StatusCode.INVALID_ARGUMENT,
        "the first message of the stream must be hello",
    )


def test_a_stream_of_the_lead_without_a_hello_is_refused(job: HandJob) -> None:
    failure = lead_pb2.ControlRequest(failure=lead_pb2.Failure(reason="because"))
    assert lead(job).refusal("LeadService/Control", failure) == (
        StatusCode.INVALID_ARGUMENT,
        "the first message of the stream must be hello",
    )


@pytest.mark.parametrize("method", ["Join", "Exchange", "Load", "Pull", "Leave"])
def test_a_frame_above_16_mib_is_refused(job: HandJob, method: str) -> None:
    code, text = lead(job).refusal(method, bytes(16 * MIB + 1))
    assert code is StatusCode.RESOURCE_EXHAUSTED
    assert "Received message larger than max (16777217 vs. 16777216)" in text


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("Join", "JoinRequest"),
        ("Exchange", "ExchangeRequest"),
        ("Load", "LoadRequest"),
        ("Pull", "PullRequest"),
        ("Describe", "DescribeRequest"),
        ("Leave", "LeaveRequest"),
    ],
)
def test_bytes_that_are_no_message_are_refused(job: HandJob, method: str, kind: str) -> None:
    assert lead(job).refusal(method, b"\xff\xff") == (
        StatusCode.INVALID_ARGUMENT,
        f"2 bytes that are no {kind}",
    )


# -- Values ----------------------------------------------------------------------------------------


def test_initial_values_are_taken_once(job: HandJob) -> None:
    frame = codec.encode_initial(job.parts_of(0)[0], job.parameters)
    refusal = lead(job).refusal("Load", LoadRequest(hello=job.hello(0)), frame)
    assert refusal == (StatusCode.INVALID_ARGUMENT, "part 0 has its initial value already")


def test_an_unknown_content_cannot_be_pulled(job: HandJob) -> None:
    request = shard_pb2.PullRequest(worker=job.workers[0])
    assert lead(job).refusal("Pull", request) == (
        StatusCode.INVALID_ARGUMENT,
        "unknown content 0",
    )


# -- The lead and the other shards -----------------------------------------------------------------


def hello_of_shard(shard: int, *, expected: int = 0) -> lead_pb2.ControlRequest:
    hello = lead_pb2.ShardHello(shard=shard, incarnation=5, expected_lead_incarnation=expected)
    return lead_pb2.ControlRequest(hello=hello)


@pytest.mark.parametrize("shard", [0, 2, 2**32 - 1])
def test_the_lead_refuses_a_shard_that_the_job_does_not_have(job: HandJob, shard: int) -> None:
    assert lead(job).refusal("LeadService/Control", hello_of_shard(shard)) == (
        StatusCode.FAILED_PRECONDITION,
        f"shard {shard} has no place beside the lead among 2 shards: list the same shards "
        "everywhere",
    )


def test_the_lead_refuses_a_second_process_for_a_shard_that_lives(job: HandJob) -> None:
    assert lead(job).refusal("LeadService/Control", hello_of_shard(1)) == (
        StatusCode.FAILED_PRECONDITION,
        "shard 1 runs already, as another process",
    )


def test_the_lead_refuses_a_shard_of_an_earlier_run(job: HandJob) -> None:
    assert lead(job).refusal("LeadService/Control", hello_of_shard(1, expected=6)) == (
        StatusCode.DATA_LOSS,
        "the lead (shard 0) restarted and lost its state: start the job again",
    )


def test_a_shard_may_restart_until_there_is_something_to_lose(tmp_path: Path) -> None:
    with Fleet(tmp_path, num_shards=2, num_workers=2) as fleet:
        job, shard = HandJob(fleet), fleet.shard(0)
        hello = hello_of_shard(1)
        for incarnation in (6, 7):
            hello.hello.incarnation = incarnation
            welcome, *_ = lead(job).call("LeadService/Control", hello)
            assert lead_pb2.ControlResponse.FromString(welcome).HasField("welcome")
        lead(job).call("Join", job.request(rank=0, shard=0))
        hello.hello.incarnation = 8
        lost = "shard 1 restarted and lost its state: start the job again"
        assert lead(job).refusal("LeadService/Control", hello) == (StatusCode.DATA_LOSS, lost)
        assert shard.wait() == 1
        assert shard.output.endswith(lost)
        job.close()


def test_a_shard_that_is_not_the_lead_has_no_control_stream(job: HandJob) -> None:
    code, _ = job.wires[1].refusal("LeadService/Control", hello_of_shard(1))
    assert code is StatusCode.UNIMPLEMENTED
