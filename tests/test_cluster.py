"""Where a process stands among others is found in its environment; who is absent is named."""

import warnings

import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters import cluster as jax_cluster

from minigpt4_jax import cluster
from minigpt4_jax.cluster import Place
from minigpt4_jax.errors import ClusterError, InputError
from tests import dying

NAMES = ("MINIGPT4_JAX_COORDINATOR", "MINIGPT4_JAX_PROCESSES", "MINIGPT4_JAX_PROCESS")
SLURM = {  # srun, the second of two tasks of a step in a job of four
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
GKE_TPU = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,b,c", "TPU_WORKER_ID": "2"}
SLICES = {  # the second of two
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.2:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
OTHERS = ("KUBERNETES_SERVICE_HOST", "JAX_LOCAL_DEVICE_IDS", "TPU_SKIP_MDS_QUERY")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables on top of none that say anything of a cluster."""
    for name in (*NAMES, *SLURM, *GKE_TPU, *SLICES, *OTHERS):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def on_tpu(monkeypatch):
    """As on a TPU's host, whose metadata is a dict."""
    metadata: dict[str, str] = {}

    def get(key):
        return metadata.get(key, ""), 200 if key in metadata else 404

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(jax_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)
    return metadata


def test_a_process_without_a_cluster_is_alone(environment):
    assert cluster.find(1) is None and cluster.start(1, 1) is None


def test_a_list_of_hosts_is_given_in_three_variables(environment):
    environment(**dict(zip(NAMES, ("host0:1234", "3", "2"))))
    assert cluster.find(1) == Place("host0:1234", 3, 2)
    environment(**dict(zip(NAMES, ("host0:1234", "1", "0"))))
    assert cluster.find(1) is None


@pytest.mark.parametrize(
    "values",
    [
        ("host0:1234", "2"),
        ("host0", "2", "0"),
        (":1234", "2", "0"),
        ("host0:123456", "2", "0"),
        ("host0:1234", "2", "2"),
        ("host0:1234", "2", "-1"),
        ("host0:1234", "two", "1"),
    ],
)
def test_a_list_that_is_half_set_or_out_of_range_is_an_error(environment, values):
    environment(**dict(zip(NAMES, values)))
    with pytest.raises(InputError, match="MINIGPT4_JAX_PROCESSES=how many there are"):
        cluster.find(1)


def test_srun_gives_the_tasks_of_its_step(environment):
    environment(**SLURM)
    found = cluster.find(1)
    assert found == Place(f"node001:{65535 - 2**12 + 1 + 12345 % 2**12}", 2, 1, (0,))
    environment(JAX_LOCAL_DEVICE_IDS="0,1")  # all GPUs of a node, say
    assert cluster.find(1).devices is None
    environment(SLURM_STEP_NUM_TASKS="1")
    assert cluster.find(1) is None


def test_sbatch_without_srun_is_one_process(environment):
    environment(**{k: v for k, v in SLURM.items() if "STEP" not in k})
    assert cluster.find(1) is None


def test_a_slice_of_gke_gives_its_workers_by_name(environment, on_tpu):
    environment(**GKE_TPU)
    found = cluster.find(1)
    assert found == Place("127.0.0.1:8482", 3, 2, None, "127.0.0.1,b,c")
    assert found.name(1) == "process 1 (b)"
    environment(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    assert cluster.find(1) is None


def test_several_slices_are_counted_on(environment, on_tpu):
    environment(**GKE_TPU, **SLICES)
    found = cluster.find(1)
    assert (found.address, found.count, found.index) == ("127.0.0.2:8482", 6, 5)
    assert found.name(4) == "process 4"  # the names are those of one slice


def test_a_pod_of_compute_engine_is_known_by_its_metadata(environment, on_tpu):
    on_tpu.update(
        {
            "agent-worker-number": "1",
            "worker-network-endpoints": "x:0:127.0.0.1,x:1:127.0.0.2",
        }
    )
    assert cluster.find(1) == Place("127.0.0.1:8482", 2, 1)
    on_tpu.update({"tpu-env": "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"})
    assert (cluster.find(1).count, cluster.find(1).index) == (6, 5)


def test_a_pod_of_kubernetes_without_an_index_is_alone(environment):
    environment(KUBERNETES_SERVICE_HOST="10.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX's, that it cannot ask the API server
        assert cluster.find(1) is None


def test_an_environment_that_makes_no_sense_says_what_to_set(environment, on_tpu):
    environment(TPU_WORKER_HOSTNAMES="127.0.0.1,b")
    with pytest.raises(InputError, match="want MINIGPT4_JAX_COORDINATOR=HOST:PORT"):
        cluster.find(1)
    environment(TPU_WORKER_HOSTNAMES="nowhere.invalid,b", TPU_WORKER_ID="1")
    with pytest.raises(ClusterError, match="nowhere.invalid"):
        cluster.find(0)


def test_jax_is_told_what_was_found_and_acts_after_the_watchdog(
    environment, monkeypatch
):
    told = []
    monkeypatch.setattr(
        cluster.jax.distributed,
        "initialize",
        lambda *args, **kw: told.append((args, kw)),
    )
    team = cluster.Team(1, ["a", "b"])
    monkeypatch.setattr(cluster, "call", lambda place, start_s: team)
    monkeypatch.setattr(cluster, "_delay_abort", lambda: None)
    environment(**SLURM)
    assert cluster.start(start_s=7, limit_s=300) is team
    ((args, knobs),) = told
    assert args == (cluster.find(1).address, 2, 1, (0,))
    assert knobs["heartbeat_timeout_seconds"] > 300


# Real processes.


def come(folder, *processes: tuple[int, int]) -> tuple[list[int | None], list[str]]:
    """Codes and words of processes (which, of how many) that wait two seconds at most."""
    port, logs = dying.free_port(), [folder / f"{i}.log" for i in range(len(processes))]
    calls = [
        (dying.coming, (port, *process, log, 2), {})
        for process, log in zip(processes, logs)
    ]
    return dying.in_processes(*calls), [log.read_text() for log in logs]


def test_all_who_come_begin(tmp_path):
    assert come(tmp_path, (0, 3), (1, 3), (2, 3))[0] == [0, 0, 0]


@pytest.mark.parametrize(
    "there, absent", [([0, 2], "process 1 of 3"), ([1, 2], "process 0 of 3")]
)
def test_a_process_that_does_not_come_is_named_by_all_others(tmp_path, there, absent):
    codes, said = come(tmp_path, *((i, 3) for i in there))
    assert codes == [75, 75]
    for words in said:
        assert f"{absent} did not come" in words and "within 2 s" in words


def test_processes_that_contradict_each_other_are_told(tmp_path):
    codes, said = come(tmp_path, (0, 3), (1, 3), (1, 3), (2, 4))
    assert sorted(codes) == [2, 2, 75, 75] and codes[0] == 75 and codes[3] == 2
    assert "process 2 of 4 has come, process 0 is of 3" in said[3]
    assert "process 1 has come twice" in said[1] + said[2]
    assert "process 2 of 3 did not come" in said[0]
