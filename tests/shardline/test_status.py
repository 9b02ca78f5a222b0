import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console, Group

from ps_core.config import load
from ps_core.errors import MismatchError, ShardlineError, ShardUnreachableError
from ps_core.settings import Config, RpcConfig
from ps_core.v1 import shard_pb2
from shardline import status
from shardline.status import Shard

WORKERS = [
    shard_pb2.WorkerStatus(
        worker=shard_pb2.WorkerId(rank=rank, incarnation=2**64 - 1),
        pid=40 + rank,
        host="node",
        clock=99 + rank,
        staleness=1,
        received_bytes=2_000_000,
        sent_bytes=3_000_000,
        received_bytes_per_second=500.0,
        state="member",
        lag_seconds=0.25 * rank,
    )
    for rank in range(2)
]
ANSWER = shard_pb2.DescribeResponse(
    shard=0,
    incarnation=2**63 + 1,
    pid=7,
    host="node",
    release="0.1.0",
    job_id="digits-3f2a91",
    phase=shard_pb2.PHASE_TRAINING,
    version=100,
    num_parts=3,
    parameter_bytes=1_500_000,
    updates_per_second=12.5,
    workers=WORKERS,
    uptime_seconds=61.0,
)
GONE = Shard("b:2", error=ShardUnreachableError("no answer from b:2"))


def printed(shards: list[Shard], width: int = 100) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width)
    console.print(status.picture(shards))
    assert isinstance(console.file, io.StringIO)
    return [re.split("  +", line.strip()) for line in console.file.getvalue().splitlines()]


def test_the_document_has_every_field_and_whole_numbers_stay_whole() -> None:
    document = json.loads(json.dumps(status.document([Shard("a:1", answer=ANSWER)])))
    [shard] = document["shards"]
    names = {field.name for field in shard_pb2.DescribeResponse.DESCRIPTOR.fields}
    assert shard.keys() == {"address", *names}
    assert shard["incarnation"] == 2**63 + 1
    assert (shard["phase"], shard["reason"], shard["version"]) == ("training", "", 100)
    worker = shard["workers"][1]
    assert worker.keys() == {field.name for field in shard_pb2.WorkerStatus.DESCRIPTOR.fields}
    assert worker["worker"] == {"rank": 1, "incarnation": 2**64 - 1}
    assert (worker["clock"], worker["state"]) == (100, "member")


def test_a_shard_without_an_answer_has_an_error_in_the_document() -> None:
    document = status.document([GONE])
    assert document["shards"] == [{"address": "b:2", "error": "no answer from b:2", "workers": []}]


def test_a_phase_of_a_later_version_stays_a_number() -> None:
    answer = shard_pb2.DescribeResponse()
    answer.MergeFromString(b"\x38\x63")  # field 7 = 99
    assert status.plain(answer)["phase"] == "99"


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([None, None], 0),
        ([None, ShardUnreachableError("x")], 3),
        ([MismatchError("x"), None], 1),
        ([MismatchError("x"), ShardUnreachableError("x")], 3),
    ],
)
def test_the_exit_code_tells_whether_all_have_answered(
    errors: list[ShardlineError | None], code: int
) -> None:
    assert status.exit_code([Shard("a:1", error=error) for error in errors]) == code


def test_people_see_a_row_per_shard_one_per_worker_and_what_is_wrong() -> None:
    other = shard_pb2.DescribeResponse()
    other.CopyFrom(ANSWER)
    other.shard, other.reason = 1, "worker 1 died"
    other.workers[1].clock = 97
    rows = printed([Shard("a:1", answer=ANSWER), Shard("c:3", answer=other), GONE])
    assert ["job digits-3f2a91"] in rows
    assert ["0", "a:1", "training", "100", "12.5", "1.5 MB", "1:01", "node:7"] in rows
    assert ["?", "b:2", "unreachable"] in rows
    # As both shards see it: the bytes add up, the slower clock counts.
    assert ["1", "member", "97", "1", "0.250 s", "4.0 MB", "1.0 kB", "6.0 MB", "node:41"] in rows
    assert rows[-2:] == [["c:3: worker 1 died"], ["b:2: no answer from b:2"]]


def test_a_narrow_terminal_cuts_no_address_and_no_process() -> None:
    answer = shard_pb2.DescribeResponse()
    answer.CopyFrom(ANSWER)
    answer.host = "a-machine-with-a-long-name"
    address = "shard-0.shards.of-a-long-namespace.svc:65000"
    console = Console(file=io.StringIO(), width=80)
    console.print(status.picture([Shard(address, answer=answer)]))
    assert isinstance(console.file, io.StringIO)
    rows = console.file.getvalue().splitlines()
    [header] = [line for line in rows if "address" in line]
    start, end = header.index("address"), header.index("phase")
    assert address in "".join(line[start:end].strip() for line in rows)
    assert "…" not in console.file.getvalue()


def test_a_job_that_was_seen_has_a_farewell_with_the_place_of_its_results(tmp_path: Path) -> None:
    here, elsewhere = (
        status.Report({}, Group(), 0, "digits-1", folder) for folder in (str(tmp_path), "/nowhere")
    )
    assert elsewhere.farewell == "job digits-1 is over: its processes are gone"
    assert here.farewell == f"{elsewhere.farewell}; how it ended is in {tmp_path}/summary.json"


def test_people_see_what_became_of_the_samples_and_who_is_slow() -> None:
    answer = shard_pb2.DescribeResponse()
    answer.CopyFrom(ANSWER)
    answer.ledger.CopyFrom(shard_pb2.Ledger(applied=1200, applied_in_part=32, granted=64, open=141))
    answer.workers[1].verdict = "2.4x slower than the median, in data"
    rows = printed([Shard("a:1", answer=answer)], width=160)
    assert [
        "samples: 1,200 applied, 32 in part, 64 with workers, 141 waiting, 0 came back, 0 abandoned"
    ] in rows
    assert rows[-1] == ["worker 1 is a straggler: 2.4x slower than the median, in data"]


def test_the_settings_that_another_worker_needs_are_in_the_document() -> None:
    answer = shard_pb2.DescribeResponse(settings={"SHARDLINE_JOB_ID": "digits"})
    assert status.plain(answer)["settings"] == {"SHARDLINE_JOB_ID": "digits"}


def test_a_picture_without_workers_has_no_table_of_them() -> None:
    rows = printed([GONE])
    assert not any("worker" in row for row in rows)
    assert ["no shard answers"] in rows
    assert ["no job yet"] in printed([Shard("a:1", answer=shard_pb2.DescribeResponse())])


def test_all_shards_are_asked_and_a_silent_one_spoils_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def describe(address: str, config: RpcConfig) -> shard_pb2.DescribeResponse:
        if address == "b:2":
            raise ShardUnreachableError("no answer from b:2")
        return ANSWER

    monkeypatch.setattr(status, "describe", describe)
    asked = status.ask(load({"cluster.shards": "a:1,b:2"}, environ={}))
    assert [shard.address for shard in asked] == ["a:1", "b:2"]
    assert asked[0].answer == ANSWER
    assert asked[1].is_unreachable
    assert status.ask(Config()) == []
