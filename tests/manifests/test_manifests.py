"""What holds of every overlay and every combination."""

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ps_core.config import check_addresses, load, split_address
from ps_core.settings import Config
from shardline.strategies import check_strategy
from tests.manifests.job_rules import action
from tests.manifests.pods import Claim, Pod, Scratch, pods
from tests.manifests.render import K8S, ROOT, Document, of_kind, pod_templates
from tests.manifests.rendered import rendered
from tests.manifests.schemas import problems

LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "component", "part-of")}
SHARD = ("python", "-P", "-m", "ps_server")
WORKER = ("python", "/examples/digits.py")
EVERYWHERE = "0.0.0.0"  # noqa: S104 - in a container
HASHED = re.compile(r"shardline-[0-9a-z]{10}")
SIZES = sorted(K8S.glob("*/*/sizes"))


def configuration(pod: Pod) -> Config:
    """What the program in it reads; a variable that it does not know is an error."""
    return load(environ=pod.environment)


def shards(documents: list[Document]) -> list[Pod]:
    return [pod for pod in pods(documents) if pod.owner.startswith("StatefulSet/")]


def workers(documents: list[Document]) -> list[Pod]:
    return [pod for pod in pods(documents) if pod.owner.startswith("Job/")]


def kustomization(folder: Path) -> Document:
    text = (folder / "kustomization.yaml").read_text(encoding="utf-8")
    found: Document = yaml.safe_load(text)
    return found


def components(folder: Path) -> list[str]:
    """In the order in which they are applied."""
    found: list[str] = kustomization(folder).get("components", [])
    return found


def ports(template: Document) -> dict[str, int]:
    (container,) = template["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def test_every_object_is_valid_and_has_no_unknown_field(documents: list[Document]) -> None:
    found = {f"{each['kind']}/{each['metadata']['name']}": problems(each) for each in documents}
    assert not {name: errors for name, errors in found.items() if errors}


def test_objects_and_pods_have_exactly_three_labels(documents: list[Document]) -> None:
    for each in (*documents, *pod_templates(documents)):
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "shardline"
        # By this one Grafana's sidecar finds dashboards.
        assert labels.keys() - {"grafana_dashboard"} == LABELS, each["metadata"]


def test_nothing_is_bound_to_a_namespace(documents: list[Document]) -> None:
    assert not [each for each in documents if "namespace" in each["metadata"]]


def test_only_overlays_choose_a_tag(folder: Path, documents: list[Document]) -> None:
    is_overlay = folder.parent.name == "overlays"
    for template in pod_templates(documents):
        (container,) = template["spec"]["containers"]
        assert (":" in container["image"]) == is_overlay
        assert not container["image"].endswith(":latest")


def test_every_variable_is_a_key_and_all_of_them_together_work(documents: list[Document]) -> None:
    for pod in pods(documents):
        check_addresses(configuration(pod))
    for pod in workers(documents):
        check_strategy(configuration(pod))


def test_every_flag_is_known_to_the_program(documents: list[Document]) -> None:
    parser = runpy.run_path(str(ROOT / "examples" / "digits.py"))["parser"]
    for pod in workers(documents):
        assert pod.command[:2] == WORKER
        parser.parse_args(pod.command[2:])  # exits at one that is not
    for pod in shards(documents):
        assert pod.command == SHARD  # by variables alone


def test_numbers_that_belong_together_agree(documents: list[Document]) -> None:
    servers, trainers = shards(documents), workers(documents)
    addresses = tuple(f"{pod.names[-1]}:7000" for pod in servers)
    for pod in (*servers, *trainers):
        config = configuration(pod)
        assert config.cluster.shards == addresses
        assert config.cluster.num_workers == len(trainers)
        index = config.server.index if pod in servers else config.cluster.rank
        assert index == pod.index


def test_a_job_has_room_for_more_workers_where_it_is_elastic(
    folder: Path, documents: list[Document]
) -> None:
    is_elastic = "../../components/elastic" in components(folder)
    for pod in workers(documents):
        config = configuration(pod)
        assert (config.cluster.num_ranks > config.cluster.num_workers) == is_elastic
        assert ("SHARDLINE_MEMBERSHIP_MIN_WORKERS" in pod.environment) == is_elastic
        assert config.membership.min_workers <= config.by_replica().cluster.num_workers


@pytest.mark.parametrize("sizes", SIZES, ids=lambda path: path.parent.name)
def test_no_component_overrides_sizes(sizes: Path) -> None:
    lines = (sizes / "job.env").read_text(encoding="utf-8").splitlines()
    told = {tuple(line.split("=", 1)) for line in lines if not line.startswith("#")}
    assert told
    for pod in pods(rendered(sizes.parent)):
        assert told <= pod.environment.items()


def test_sizes_are_the_last_component_since_what_a_folder_generates_comes_before(
    folder: Path,
) -> None:
    listed = components(folder)
    assert (folder / "sizes" in SIZES) == (listed[-1:] == ["sizes"])
    assert not listed or "configMapGenerator" not in kustomization(folder)


def test_all_pods_read_the_same_configmap_whose_name_changes_with_it(
    documents: list[Document],
) -> None:
    (config_map,) = (
        each["metadata"]["name"]
        for each in of_kind(documents, "ConfigMap")
        if each["metadata"]["labels"]["app.kubernetes.io/component"] == "job"
    )
    assert HASHED.fullmatch(config_map)
    for template in pod_templates(documents):
        (container,) = template["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": config_map}}]


def test_workers_meet_at_the_first_of_them(documents: list[Document]) -> None:
    (job,) = of_kind(documents, "Job")
    rendezvous = {configuration(pod).cluster.rendezvous for pod in workers(documents)}
    named = ports(job["spec"]["template"])
    if rendezvous == {""}:
        assert "rendezvous" not in named
        return
    first = workers(documents)[0]
    assert rendezvous == {f"{first.names[-1]}:{named['rendezvous']}"}
    assert all(configuration(pod).cluster.serve_rendezvous for pod in workers(documents))


def test_ports_and_probes_are_where_the_program_listens(documents: list[Document]) -> None:
    templates = {each["spec"]["serviceAccountName"]: each for each in pod_templates(documents)}
    for pod in pods(documents):
        config, named = configuration(pod), ports(templates[pod.owner.partition("/")[2]])
        assert (config.metrics.host, config.metrics.port) == (EVERYWHERE, named["metrics"])
        if pod.owner.startswith("StatefulSet/"):
            listens = config.cluster.shards[pod.index]
            assert (config.server.host, split_address(listens)[1]) == (EVERYWHERE, named["grpc"])
            assert pod.probes.keys() == {"startup", "readiness", "liveness"}
            assert {probe.port for probe in pod.probes.values()} == {named["grpc"]}


def test_pods_have_time_to_leave(documents: list[Document]) -> None:
    for pod in shards(documents):  # its open calls, then its last word to the lead
        assert pod.grace_seconds > 2 * configuration(pod).rpc.drain_seconds
        assert configuration(pod).server.stay
    for pod in workers(documents):
        assert pod.grace_seconds > configuration(pod).worker.grace_seconds


def test_pods_keep_to_the_restricted_standard(documents: list[Document]) -> None:
    for template in pod_templates(documents):
        assert template["spec"]["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        (container,) = template["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_pods_request_what_they_need_and_are_bounded_in_memory(documents: list[Document]) -> None:
    for template in pod_templates(documents):
        (container,) = template["spec"]["containers"]
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert container["resources"]["limits"].keys() - {"nvidia.com/gpu"} == {"memory"}
    for pod in pods(documents):
        scratch = [each.volume for each in pod.mounts if isinstance(each.volume, Scratch)]
        assert sum(each.num_bytes for each in scratch) <= pod.limits["memory"] / 2


def test_results_go_to_the_claim_and_tmp_to_memory(documents: list[Document]) -> None:
    for pod in pods(documents):
        volumes = {mount.path: mount.volume for mount in pod.mounts}
        assert volumes[configuration(pod).job.run_dir] == Claim("runs")
        assert isinstance(volumes["/tmp"], Scratch)  # noqa: S108 - in a container


@pytest.mark.parametrize("overlay", ["local", "production", "production-gpu"])
def test_a_claim_for_several_nodes_names_its_storage_class(overlay: str) -> None:
    (claim,) = of_kind(rendered(K8S / "overlays" / overlay), "PersistentVolumeClaim")
    is_shared = claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert is_shared == (overlay != "local") == ("storageClassName" in claim["spec"])


def test_service_accounts_exist_and_bring_no_token(documents: list[Document]) -> None:
    accounts = {each["metadata"]["name"]: each for each in of_kind(documents, "ServiceAccount")}
    assert not any(each["automountServiceAccountToken"] for each in accounts.values())
    used = {each["spec"]["serviceAccountName"] for each in pod_templates(documents)}
    assert used == accounts.keys()


def test_selectors_choose_the_pods_of_their_name(documents: list[Document]) -> None:
    labels = {
        each["spec"]["serviceAccountName"]: each["metadata"]["labels"]
        for each in pod_templates(documents)
    }
    for kind in ("Service", "PodDisruptionBudget", "StatefulSet"):
        for each in of_kind(documents, kind):
            selector = each["spec"]["selector"]
            chosen = selector.get("matchLabels", selector)
            assert chosen == labels[each["metadata"]["name"]]


def test_pods_are_spread_over_nodes(documents: list[Document]) -> None:
    for template in pod_templates(documents):
        (constraint,) = template["spec"]["topologySpreadConstraints"]
        chosen = constraint["labelSelector"]["matchLabels"]
        assert chosen.items() <= template["metadata"]["labels"].items()
        assert chosen["app.kubernetes.io/name"] == template["spec"]["serviceAccountName"]


@pytest.mark.parametrize(("exit_code", "expected"), [(75, "Ignore"), (1, "Count"), (2, "FailJob")])
def test_a_worker_that_was_told_to_end_is_no_failure(
    documents: list[Document], exit_code: int, expected: str
) -> None:
    (job,) = of_kind(documents, "Job")
    assert action(job, exit_code) == expected


def test_neither_is_a_worker_whose_node_went_away(documents: list[Document]) -> None:
    (job,) = of_kind(documents, "Job")
    first: dict[str, Any] = job["spec"]["podFailurePolicy"]["rules"][0]
    assert first == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }


def test_an_elastic_job_has_room_for_workers_that_come_later() -> None:
    documents = copy.deepcopy(rendered(K8S / "tests" / "elastic"))
    (job,) = of_kind(documents, "Job")
    before = workers(documents)
    job["spec"] |= {"completions": 8, "parallelism": 8}
    after = workers(documents)
    assert [pod.environment for pod in after[: len(before)]] == [pod.environment for pod in before]
    assert [configuration(pod).cluster.rank for pod in after] == list(range(8))


def test_without_shards_nothing_of_them_is_left() -> None:
    documents = rendered(K8S / "tests" / "allreduce")
    assert not [each for each in documents if each["metadata"]["name"] == "ps-server"]
    assert {configuration(pod).strategy for pod in workers(documents)} == {"allreduce"}


@pytest.mark.parametrize(("combination", "expected"), [("pipeline", 2), ("pipeline-resized", 4)])
def test_stages_of_a_pipeline_have_shards_and_whole_replicas(
    combination: str, expected: int
) -> None:
    config = configuration(workers(rendered(K8S / "tests" / combination))[0])
    assert (config.pipeline.stages, config.by_replica().cluster.num_workers) == (2, expected)
    assert config.strategy == "parameter-server"


def test_a_worker_with_a_gpu_asks_for_one_and_has_memory_to_share() -> None:
    for pod in workers(rendered(K8S / "tests" / "gpu")):
        assert pod.limits["nvidia.com/gpu"] == 1
        assert configuration(pod).worker.device == "cuda"
        assert "/dev/shm" in {mount.path for mount in pod.mounts}  # noqa: S108 - in a container


def test_tolerations_of_several_components_add_up() -> None:
    (job,) = of_kind(rendered(K8S / "tests" / "everything"), "Job")
    assert [each["key"] for each in job["spec"]["template"]["spec"]["tolerations"]] == [
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    ]


@pytest.mark.parametrize("combination", ["monitoring", "pod-monitor"])
def test_all_pods_of_a_namespace_are_scraped_as_one_job(combination: str) -> None:
    documents = rendered(K8S / "tests" / combination)
    (monitor,) = of_kind(documents, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["relabelings"] == [
        {
            "sourceLabels": ["__meta_kubernetes_namespace"],
            "targetLabel": "job",
            "replacement": "$1/shardline",
        }
    ]
    for template in pod_templates(documents):
        labels = template["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert endpoint["port"] in ports(template)


def test_a_pod_monitor_brings_no_second_copy_of_rules_and_dashboards() -> None:
    documents = rendered(K8S / "tests" / "pod-monitor")
    component = "app.kubernetes.io/component"
    found = [each for each in documents if each["metadata"]["labels"][component] == "monitoring"]
    assert [each["kind"] for each in found] == ["PodMonitor"]


def test_every_component_says_what_it_is_for_and_is_in_a_combination() -> None:
    names = {path.name for path in (K8S / "components").iterdir()}
    texts = [path.read_text(encoding="utf-8") for path in K8S.glob("*/*/kustomization.yaml")]
    for name in names:
        assert (K8S / "components" / name / "README.md").is_file()
        assert any(f"/{name}\n" in text for text in texts)
