from dataclasses import replace
from pathlib import Path

import pytest

from tests.manifests.containers import Place, docker_run
from tests.manifests.pods import Pod, pods
from tests.manifests.samples import claim, config_map, service, stateful_set

PLACE = Place("net", "mark=net", Path("/made"))


@pytest.fixture
def pod() -> Pod:
    return pods([stateful_set(), service(), claim(), config_map()])[1]


def test_the_command_says_all_that_the_pod_says(pod: Pod) -> None:
    words = (
        "docker run --detach --name a --label mark=net --network net --hostname shard-1 "
        "--network-alias shards --network-alias shard-1.shards "
        "--user 7:8 --group-add 9 --cap-drop ALL --security-opt no-new-privileges --read-only "
        "--memory 1048576 --memory-swap 1048576 "
        "--mount type=volume,source=net-runs,target=/runs "
        "--tmpfs /tmp:rw,exec,mode=1777,size=1048576 "
        "--mount type=bind,source=/made/shard-1/etc-texts,target=/etc/texts,readonly "
        "--env INDEX=1 --no-healthcheck --entrypoint serve shards:1 --index=1"
    )
    assert docker_run(pod, "a", PLACE) == words.split()


def test_the_command_does_not_harden_what_the_pod_leaves_soft(pod: Pod) -> None:
    soft = replace(pod, drops_all_capabilities=False, may_escalate=True, read_only_root=False)
    assert not {"--cap-drop", "--security-opt", "--read-only"} & set(docker_run(soft, "a", PLACE))


def test_a_device_is_refused(pod: Pod) -> None:
    with pytest.raises(ValueError, match=r"nvidia\.com/gpu"):
        docker_run(replace(pod, limits={"memory": 1, "nvidia.com/gpu": 1}), "a", PLACE)
