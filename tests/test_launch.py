"""The launchers of launch/, with stubs in place of gcloud, kubectl, ssh, srun and Python.

A stub notes its arguments. Those of gcloud and ssh also run the command that they are
given, as the real ones do: split by a shell, in the home of each machine.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("launch/*.sh"))
SOURCED = {"common.sh", "jobset.sh", "remote.sh", "queued.sh"}
LAUNCHERS = {"tpu_pod.sh", "gke.sh", "hosts.sh", "slurm.sh", "gpus.sh"}

AWKWARD = """--config.data.laion.path=/a b/'q' "r" $HOME $(HOME) `id` \\ ; & * #\né"""
RUN = ("--config", "configs/stage1.py:13b", "--workdir", "/w o/stage1")
TRAIN = ["-m", "minigpt4_jax.train", *RUN]
POD = ("--name", "pod", "--zone", "zone-a", "--project", "p", "--type", "v5litepod-8")
JOBSET = ("--name", "js", "--image", "i", "--bucket", "b", "--topology", "4x4")
IN_BUCKET = ("--config", "configs/stage1.py", "--workdir", "/bucket/stage1")

# Arguments that are enough for each launcher.
ENOUGH = {
    "tpu_pod.sh": ("train", *POD, *RUN),
    "gke.sh": ("train", *JOBSET, *IN_BUCKET),
    "hosts.sh": ("train", "--hosts", "a,me@b", *RUN),
    "slurm.sh": RUN,
    "gpus.sh": RUN,
}


class Bench:
    """A folder of stubs, which come first in PATH, and what they noted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.workdir = folder / "work dir"
        # In the checkout, and in the archive that the stub of git makes.
        self.run = ("--config", "configs/stage1.py", "--workdir", str(self.workdir))
        self.train = ["-m", "minigpt4_jax.train", *self.run]
        self.env = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "BENCH": str(folder),
            "RETRY_SECONDS": "0",
            "LOCK_SECONDS": "0.2",
            "PYTHON": f"{folder}/bin/python",
        }
        (folder / "bin").mkdir()
        self.stub("sleep", "exec /bin/sleep 0.05", note=False)
        self.stub("python", PYTHON)

    def stub(self, name: str, body: str = "", note: bool = True) -> None:
        path = self.folder / "bin" / name
        # In one write, so that machines which begin together do not mix.
        noting = f'note=$(printf "%s\\1" {name} "$@"); printf "%s\\2" "$note" >> "$BENCH/calls"'
        path.write_text(f"#!/bin/bash\n{noting if note else ''}\n{body}\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        notes = self.folder / "calls"
        found = notes.read_text().split("\2")[:-1] if notes.exists() else []
        split = [note.split("\1")[:-1] for note in found]
        return [arguments for stub, *arguments in split if stub == name]

    def command(self, script: str, *arguments: str) -> list[str]:
        return [str(ROOT / "launch" / script), *arguments]

    def launch(self, script: str, *arguments: str, **env: str):
        return subprocess.run(
            self.command(script, *arguments),
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def ends(self, *codes: int, machine: str = "") -> None:
        """How the next runs end, on one of the machines."""
        path = self.folder / f"ends{machine}"
        path.write_text("".join(f"{code}\n" for code in codes))


# Training that leaves at once, with the next code of a list.
PYTHON = """
ends=$BENCH/ends${MACHINE-}
code=$(head -n 1 "$ends" 2> /dev/null)
[ -z "$code" ] || sed -i 1d "$ends"
echo "this is ${MACHINE-here}"
exit "${code:-0}"
"""


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def cloud(bench) -> Bench:
    """With a gcloud that knows one queued resource, of two machines."""
    for machine in ("w0", "w1"):
        (bench.folder / machine).mkdir()
    bench.stub("hostname", 'echo "$MACHINE"', note=False)
    # The archive holds what a worker runs before Python: the whole would take seconds.
    bench.stub("git", GIT)
    bench.stub("python3")  # pip install uv
    bench.stub("gcloud", GCLOUD)
    return bench


GIT = """
case $1 in
    rev-parse) echo "$BENCH" ;;
    archive) tar czf "${2#--output=}" launch configs/stage1.py ;;
esac
"""

GCLOUD = """
verb=$4 state=$BENCH/state status=0
for last; do [[ $last != --command=* ]] || command=${last#--command=}; done
each() { if [[ "$*" == *--worker=all* ]]; then echo w0 w1; else echo w0; fi; }
case $verb in
    describe)
        [[ -e $state ]] || { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
        cat "$state"
        echo 'Updates are available' >&2
        ;;
    create) echo ACTIVE > "$state" ;;
    delete) rm "$state"; rm -rf "$BENCH"/w?/* "$BENCH"/w?/.[a-z]* ;;
    scp) for machine in $(each "$@"); do cp "$5" "$BENCH/$machine/${6#*:}"; done ;;
    ssh)
        if [[ $command == *follow && -e $BENCH/preempt ]]; then
            rm "$BENCH/preempt"
            echo SUSPENDED > "$state"
            exit 255
        fi
        for machine in $(each "$@"); do
            export MACHINE=$machine HOME=$BENCH/$machine
            mkdir -p "$HOME/.local/bin"
            printf '#!/bin/bash\\n%s\\n' 'mkdir -p .venv/bin; ln -sf "$BENCH/bin/python" .venv/bin/' > "$HOME/.local/bin/uv"
            chmod +x "$HOME/.local/bin/uv"
            [[ ! -e $BENCH/apart || $MACHINE == w0 ]] || rm -f "$BENCH/work dir/.reached"
            (cd "$HOME" && exec bash -c "$command") || status=$?
        done
        exit $status
        ;;
esac
"""


def verbs(bench: Bench) -> list[str]:
    """What was asked of gcloud, in order: its verb, or what a worker was to do."""
    found = []
    for call in bench.calls("gcloud"):
        command = next((a for a in call if a.startswith("--command=")), "")
        todo = re.search(r"worker\.sh (\w+)", command.rpartition("then")[2])
        found.append(todo.group(1) if todo else call[3])
    return [verb for verb in found if verb != "describe"]


# What holds for all of them.


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    paths = [f"launch/{name}" for name in SCRIPTS]
    result = subprocess.run(
        [shellcheck, *paths], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_runs_unless_it_is_sourced(script):
    path = ROOT / "launch" / script
    lines = path.read_text().splitlines()
    code = [
        line for line in lines if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(code) <= 62 or script in {"common.sh", "train_local.sh"}
    assert len(lines) <= 60 or script not in LAUNCHERS  # its help included
    assert os.access(path, os.X_OK) == (script not in SOURCED)


@pytest.mark.parametrize("script", sorted(LAUNCHERS))
def test_a_dry_run_prints_the_command_and_does_nothing(bench, script):
    for name in ("gcloud", "kubectl", "ssh", "squeue", "sbatch", "nvidia-smi", "git"):
        bench.stub(name)
    before = sorted(bench.folder.rglob("*"))
    result = bench.launch(script, *ENOUGH[script], "--dry-run", "--", "--config.seed=7")
    assert result.returncode == 0, result.stderr
    printed = result.stdout + result.stderr
    assert "minigpt4_jax.train" in printed and "--config.seed=7" in printed
    asked = [call for call in bench.calls("git") if call[0] != "rev-parse"]
    assert sorted({*bench.folder.rglob("*")} - {bench.folder / "calls"}) == before
    assert asked == [] and bench.calls("gcloud") == bench.calls("ssh") == []
    assert (
        bench.calls("python") == bench.calls("kubectl") == bench.calls("sbatch") == []
    )


@pytest.mark.parametrize("script", sorted(LAUNCHERS))
def test_help_names_every_flag_and_its_own_path(bench, script):
    result = bench.launch(script, "--help")
    assert result.returncode == 0
    assert f"usage: launch/{script}" in result.stdout
    text = (ROOT / "launch" / script).read_text()
    names, switches = re.search(r'^take "(.*)" "(.*)" ', text, re.MULTILINE).groups()
    for flag in f"{names} {switches}".split():
        assert f"--{flag}" in result.stdout
    assert "shellcheck" not in result.stdout


@pytest.mark.parametrize("script", sorted(LAUNCHERS))
@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda a: without(a, "--config"), "--config is missing"),
        (lambda a: without(a, "--workdir"), "--workdir is missing"),
        (lambda a: [*a, "--config", "configs/none.py"], "no such file"),
        (lambda a: [*a, "--config=configs/none.py:13b"], "no such file"),
        (lambda a: [*a, "--workdir", "gs://bucket/w"], "mount the bucket"),
        (lambda a: [*a, "--workdri", "/w"], "unknown argument --workdri"),
        (lambda a: [*a, "--config.batch_size=8"], "unknown argument --config.batch"),
        (lambda a: [*a, "stray"], "unknown argument stray"),
        (lambda a: [*a, "--dry-run=no"], "unknown argument --dry-run=no"),
        (lambda a: [*a, "--workdir"], "--workdir wants a value"),
        (lambda a: [*a, "--workdir", "--dry-run"], "--workdir wants a value"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_hint(bench, script, change, complaint):
    result = bench.launch(script, *change(list(ENOUGH[script])))
    assert result.returncode == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


def without(arguments: list[str], flag: str) -> list[str]:
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize(
    "script, flag, hint",
    [
        ("tpu_pod.sh", "--zone", "gcloud compute tpus locations list"),
        ("tpu_pod.sh", "--project", "gcloud projects list"),
        ("tpu_pod.sh", "--name", "--name stage1"),
        ("tpu_pod.sh", "--type", "accelerator-types list --zone=zone-a"),
        ("gke.sh", "--name", "--name stage1"),
        ("gke.sh", "--image", "launch/Dockerfile"),
        ("gke.sh", "--bucket", "which all hosts reach"),
        ("gke.sh", "--topology", "as 4x4"),
        ("hosts.sh", "--hosts", "--hosts a,b,c"),
    ],
)
def test_what_is_missing_is_said_with_a_hint(bench, script, flag, hint):
    given = without(list(ENOUGH[script]), flag)
    gone = {"CLOUDSDK_COMPUTE_ZONE": "", "CLOUDSDK_CORE_PROJECT": ""}
    result = bench.launch(script, *given, **gone)
    assert result.returncode == 2
    assert f"{flag} is missing" in result.stderr and hint in result.stderr


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        ("tpu_pod.sh", [], "want train, follow, stop, delete first"),
        ("tpu_pod.sh", ["start", *POD], "got start"),
        ("tpu_pod.sh", [*POD], "want train"),
        ("tpu_pod.sh", ["train", *POD, *RUN, "--type", "v9-8"], "--runtime is missing"),
        ("tpu_pod.sh", ["train", *POD, *RUN, "--workdir", "w"], "want its full path"),
        ("tpu_pod.sh", ["train", *POD, *RUN, "--slices", "a[0]"], "want a number"),
        (
            "hosts.sh",
            ["train", "--hosts=a", *RUN, "--config=/c.py"],
            "of this checkout",
        ),
        ("hosts.sh", ["delete", "--hosts", "a"], "got delete"),
        ("gke.sh", ["train", *JOBSET, *RUN], "want a folder of the bucket"),
        ("gke.sh", ["train", *JOBSET, *IN_BUCKET, "--topology=16"], "want it as 4x4"),
        ("gke.sh", ["train", *JOBSET, *IN_BUCKET, "--chips=32"], "fewer chips"),
        ("gke.sh", ["train", *JOBSET, *IN_BUCKET, "--slices=two"], "want numbers"),
        ("slurm.sh", [*RUN, "--gpus", "a100:8"], "want numbers"),
    ],
)
def test_each_has_its_own_refusals(bench, script, arguments, complaint):
    result = bench.launch(script, *arguments)
    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr


# tpu_pod.sh


def test_a_pod_is_requested_set_up_and_trained_on(cloud):
    flags = ("--spot", "--setup", "echo 'set up' >> ~/mounts", "--", AWKWARD)
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run, *flags)
    assert result.returncode == 0, result.stderr
    create, *_ = (c for c in cloud.calls("gcloud") if c[3] == "create")
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod"),
        *("--spot", "--accelerator-type=v5litepod-8"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--zone=zone-a", "--project=p"),
    ]
    assert verbs(cloud) == [
        *("create", "idle", "scp", "ssh", "install"),
        *("mark", "seen", "begin", "follow", "code"),
    ]
    assert cloud.calls("python") == [[*cloud.train, AWKWARD]] * 2
    for machine in ("w0", "w1"):
        assert (cloud.folder / machine / "mounts").read_text() == "set up\n"
        log = cloud.folder / machine / ".minigpt4-jax" / machine / "log"
        assert log.read_text() == f"this is {machine}\n"
    assert "this is w0" in result.stdout and "this is w1" not in result.stdout


def test_several_slices_are_one_request(cloud):
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run, "--slices=2")
    assert result.returncode == 0, result.stderr
    (create,) = (c for c in cloud.calls("gcloud") if c[3] == "create")
    assert {"--node-count=2", "--node-prefix=pod"} < {*create}
    assert "--spot" not in create and "--node-id=pod" not in create


def test_a_preempted_pod_is_requested_again_and_trains_on(cloud):
    (cloud.folder / "preempt").touch()
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run, "--", AWKWARD)
    assert result.returncode == 0, result.stderr
    once = [
        "create",
        "idle",
        "scp",
        "ssh",
        "install",
        "mark",
        "seen",
        "begin",
        "follow",
    ]
    assert verbs(cloud) == [*once, "delete", *once, "code"]
    assert cloud.calls("python") == [[*cloud.train, AWKWARD]] * 4


@pytest.mark.parametrize("code", [75, 143])
def test_a_run_that_hung_or_was_told_to_end_begins_again(cloud, code):
    cloud.ends(134, machine="w0")
    cloud.ends(code, machine="w1")
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run)
    assert result.returncode == 0, result.stderr
    assert verbs(cloud).count("begin") == 2 and verbs(cloud).count("create") == 1
    assert "it begins again" in result.stderr


def test_a_fault_ends_the_launcher_with_its_code(cloud):
    cloud.ends(3, machine="w1")
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run)
    assert result.returncode == 3
    assert verbs(cloud).count("begin") == 1


def test_a_run_that_comes_no_further_is_given_up(cloud):
    cloud.ends(*[75] * 9, machine="w0")
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run)
    assert result.returncode == 75
    assert verbs(cloud).count("begin") == 4
    assert "three runs without a checkpoint" in result.stderr


def test_a_workdir_that_is_not_shared_is_refused(cloud):
    (cloud.folder / "apart").touch()
    result = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run)
    assert result.returncode == 4
    assert "not the same folder on every machine" in result.stderr
    assert cloud.calls("python") == []


def test_a_second_launch_over_a_running_one_is_refused(cloud):
    for machine in ("w0", "w1"):
        cloud.ends(143, machine=machine)
    cloud.stub("python", SLOW)
    command = cloud.command("tpu_pod.sh", "train", *POD, *cloud.run)
    with subprocess.Popen(command, env=cloud.env, stderr=subprocess.DEVNULL) as first:
        wait_for(lambda: len(cloud.calls("python")) == 2)
        second = cloud.launch("tpu_pod.sh", "train", *POD, *cloud.run)
        assert second.returncode == 2
        assert "a run is under way there" in second.stderr
        assert "`follow` shows it, `stop` ends it" in second.stderr
        stop = cloud.launch("tpu_pod.sh", "stop", *POD)
        assert stop.returncode == 0, stop.stderr
        assert first.wait(timeout=20) == 0  # stopped on purpose: not begun again
    assert len(cloud.calls("python")) == 2


# Training that lasts until it is told to end.
SLOW = """
trap 'touch "$BENCH/saved${MACHINE-}"; exit 143' TERM
for ((i = 0; i < 400; i++)); do /bin/sleep 0.05; done
"""


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing came within 20 s")


def test_a_run_begins_once_however_often_it_is_told_to(bench):
    bench.stub("python", SLOW)
    env = bench.env | {"HOME": str(bench.folder)}
    worker = bench.command("worker.sh")

    def do(*arguments: str) -> str:
        result = subprocess.run(
            [*worker, *arguments], env=env, capture_output=True, text=True, timeout=30
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert do("code") == "code=143\n"  # none: its machine went with it
    do("mark", str(bench.workdir))
    for _ in range(2):
        do("begin", f"{bench.folder}/bin/python", "a b")
    do("stop")
    assert do("code") == "code=0\n"
    assert bench.calls("python") == [["a b"]]
    assert (bench.folder / "saved").exists()


def test_a_pod_that_somebody_deleted_is_not_requested_again(cloud):
    cloud.stub("gcloud", "echo 'ERROR: NOT_FOUND' >&2; exit 1")
    result = cloud.launch("tpu_pod.sh", "follow", *POD, *cloud.run)
    assert result.returncode == 2
    assert "somebody has deleted it" in result.stderr
    assert "create" not in verbs(cloud)


def test_a_pod_is_given_back(cloud):
    result = cloud.launch("tpu_pod.sh", "delete", *POD, "--dry-run")
    assert result.returncode == 0 and cloud.calls("gcloud") == []
    (cloud.folder / "state").touch()
    assert cloud.launch("tpu_pod.sh", "delete", *POD).returncode == 0
    assert cloud.calls("gcloud") == [
        [
            *("compute", "tpus", "queued-resources", "delete", "pod"),
            *("--force", "--quiet", "--zone=zone-a", "--project=p"),
        ]
    ]


def test_zone_and_project_may_come_from_gclouds_own_variables(bench):
    arguments = ("delete", "--name=pod", "--dry-run")
    env = {"CLOUDSDK_COMPUTE_ZONE": "z 1", "CLOUDSDK_CORE_PROJECT": "q"}
    result = bench.launch("tpu_pod.sh", *arguments, **env)
    assert result.stderr.endswith("--zone=z\\ 1 --project=q \n")


# hosts.sh


@pytest.fixture
def hosts(bench) -> Bench:
    """With an ssh to two hosts, which share this checkout's scripts under another path."""
    folder = bench.folder / "check out"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / ".venv/bin/python").symlink_to(bench.folder / "bin/python")
    bench.stub("hostname", 'echo "$MACHINE"', note=False)
    bench.stub("ssh", SSH)
    return bench


SSH = """
shift 3
export MACHINE=${1#*@} HOME=$BENCH
shift
cd "$HOME" && exec bash -c "$*"
"""


def test_hosts_train_together(hosts):
    hosts.stub("python", 'env | grep ^MINIGPT4_JAX_ > "$BENCH/env.$MACHINE"')
    given = ("--hosts", "me@a,b", "--dir", str(hosts.folder / "check out"), "--port=99")
    result = hosts.launch("hosts.sh", "train", *given, *hosts.run, "--", AWKWARD)
    assert result.returncode == 0, result.stderr
    assert hosts.calls("python") == [[*hosts.train, AWKWARD]] * 2
    for i, host in enumerate(("a", "b")):
        env = (hosts.folder / f"env.{host}").read_text().splitlines()
        assert {
            "MINIGPT4_JAX_COORDINATOR=a:99",
            "MINIGPT4_JAX_PROCESSES=2",
            f"MINIGPT4_JAX_PROCESS={i}",
        } <= {*env}


def test_a_run_on_hosts_begins_again_and_only_once_at_a_time(hosts):
    given = ("--hosts", "a,b", "--dir", str(hosts.folder / "check out"))
    hosts.ends(134, machine="a")
    hosts.ends(75, machine="b")
    result = hosts.launch("hosts.sh", "train", *given, *hosts.run)
    assert result.returncode == 0, result.stderr
    assert len(hosts.calls("python")) == 4

    hosts.stub("python", SLOW)
    command = hosts.command("hosts.sh", "train", *given, *hosts.run)
    with subprocess.Popen(command, env=hosts.env, stderr=subprocess.DEVNULL) as first:
        wait_for(lambda: len(hosts.calls("python")) == 6)
        second = hosts.launch("hosts.sh", "train", *given, *hosts.run)
        assert second.returncode == 2 and "a run is under way there" in second.stderr
        assert hosts.launch("hosts.sh", "stop", *given).returncode == 0
        assert first.wait(timeout=20) == 0
    assert len(hosts.calls("python")) == 6
    assert (hosts.folder / "saveda").exists() and (hosts.folder / "savedb").exists()
    idle = hosts.launch("hosts.sh", "stop", *given)
    assert idle.returncode == 0 and "no run is under way" in idle.stderr


# gke.sh


def jobset(text: str) -> dict:
    return yaml.safe_load(text)


def test_a_jobset_runs_the_command_on_every_host_of_every_slice(bench):
    flags = ("--slices=2", "--spot", "--account=me", "--image", "r/a:b", "--dry-run")
    awkward = AWKWARD + " @name@ $$(X)"
    result = bench.launch("gke.sh", "train", *JOBSET, *IN_BUCKET, *flags, "--", awkward)
    assert result.returncode == 0, result.stderr
    assert "@image@" not in result.stdout
    found = jobset(result.stdout)
    assert (found["apiVersion"], found["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    assert found["metadata"]["name"] == "js"
    (slices,) = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4  # 16 chips, 4 to a host
    assert pod["serviceAccountName"] == "me"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == "r/a:b"
    expanded = [word.replace("$$", "$") for word in container["command"]]
    train = ["python", "-m", "minigpt4_jax.train", *IN_BUCKET]
    assert expanded == [*train, awkward]
    assert all("$" not in word.replace("$$", "") for word in container["command"])


def test_the_cluster_begins_again_what_hung_was_told_to_end_or_lost_a_host(bench):
    result = bench.launch("gke.sh", "train", *JOBSET, *IN_BUCKET, "--dry-run")
    spec = jobset(result.stdout)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    exits = rule["onExitCodes"]
    assert (rule["action"], exits["operator"]) == ("FailJob", "NotIn")
    assert {75, 143} <= {*exits["values"]} and {1, 2, 3, 4, 5}.isdisjoint(
        exits["values"]
    )
    assert exits["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert spec["failurePolicy"]["rules"] == [
        {
            "name": "fault",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    assert job["backoffLimit"] == 0  # one host lost: all of them begin again


KUBECTL = """
case $1 in
    get) cat "$BENCH/jobset" 2> /dev/null ;;
    apply) cat > "$BENCH/applied" ;;
    logs) echo "a line"; printf 'js Completed' > "$BENCH/jobset" ;;
esac
"""


@pytest.mark.parametrize("state", ["", "js Completed", "js Failed"])
def test_a_jobset_is_applied_where_none_runs(bench, state):
    bench.stub("kubectl", KUBECTL)
    (bench.folder / "jobset").write_text(state)
    result = bench.launch("gke.sh", "train", *JOBSET, *IN_BUCKET)
    assert result.returncode == 0, result.stderr
    get, *rest = bench.calls("kubectl")
    assert get[:3] == ["get", "jobset", "js"]
    ended = [["delete", "jobset", "js"]] if state else []
    assert rest == [*ended, ["apply", "--filename=-"]]
    assert jobset((bench.folder / "applied").read_text())["metadata"]["name"] == "js"


def test_a_jobset_that_runs_is_left_alone(bench):
    bench.stub("kubectl", KUBECTL)
    (bench.folder / "jobset").write_text("js ")
    result = bench.launch("gke.sh", "train", *JOBSET, *IN_BUCKET)
    assert result.returncode == 2
    assert "`follow` shows it, `delete` ends it" in result.stderr
    assert [call[0] for call in bench.calls("kubectl")] == ["get"]


def test_a_jobset_is_followed_and_deleted(bench):
    bench.stub("kubectl", KUBECTL)
    (bench.folder / "jobset").write_text("js ")
    result = bench.launch("gke.sh", "follow", "--name=js")
    assert result.returncode == 0 and result.stdout == "a line\n"
    assert bench.launch("gke.sh", "delete", "--name=js").returncode == 0
    assert bench.calls("kubectl")[-1] == ["delete", "jobset", "js"]
    (bench.folder / "jobset").write_text("")
    bench.stub("kubectl")
    gone = bench.launch("gke.sh", "follow", "--name=js")
    assert gone.returncode == 1 and "there is no JobSet js" in gone.stderr


# slurm.sh


def test_a_job_is_submitted_with_the_command_as_typed(bench):
    bench.stub("squeue", "echo '7 minigpt4 /other'")
    bench.stub("sbatch")
    flags = ("--nodes=2", "--gpus", "4", "--", AWKWARD)
    result = bench.launch("slurm.sh", *bench.run, *flags)
    assert result.returncode == 0, result.stderr
    (call,) = bench.calls("sbatch")
    at = call.index("launch/slurm_job.sh")
    assert call[at + 1 :] == [
        *(str(bench.workdir), f"{bench.folder}/bin/python", *bench.train, AWKWARD)
    ]
    assert {
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4"),
        *("--cpus-per-task=32", "--requeue", "--signal=TERM@300"),
        *(f"--chdir={ROOT}", f"--output={bench.workdir}/slurm-%j.log"),
    } <= {*call[:at]}
    assert bench.workdir.is_dir()


def test_a_second_job_in_a_workdir_is_refused(bench):
    bench.stub("squeue", f"echo '12 minigpt4 {bench.workdir}'")
    bench.stub("sbatch")
    result = bench.launch("slurm.sh", *bench.run)
    assert result.returncode == 2
    assert "job 12 trains there already" in result.stderr
    assert "scancel 12" in result.stderr
    assert bench.calls("sbatch") == []


def test_without_slurm_it_is_said(bench):
    bench.stub("squeue", "exit 1")
    result = bench.launch("slurm.sh", *bench.run)
    assert result.returncode == 2 and "login node" in result.stderr


@pytest.mark.parametrize(
    "code, state, restarts, saved, requeued",
    [
        (0, "RUNNING", 0, False, False),
        (143, "RUNNING", 9, False, True),  # the time limit
        (143, "COMPLETING", 0, False, False),  # scancel, or SLURM's own requeue
        (75, "RUNNING", 0, False, True),
        (75, "RUNNING", 3, False, False),
        (75, "RUNNING", 3, True, True),
        (3, "RUNNING", 0, False, False),
        (134, "RUNNING", 0, False, False),
    ],
)
def test_a_job_is_requeued_when_there_is_more_to_do(
    bench, code, state, restarts, saved, requeued
):
    save = f'mkdir -p "{bench.workdir}/checkpoints/500"; ' if saved else ""
    bench.stub("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    bench.stub("python", f'echo "$JAX_LOCAL_DEVICE_IDS"; {save}exit {code}')
    bench.stub("squeue", f"echo {state}")
    bench.stub("scontrol")
    result = subprocess.run(
        [
            *(f"{ROOT}/launch/slurm_job.sh", str(bench.workdir)),
            *(f"{bench.folder}/bin/python", *bench.train, AWKWARD),
        ],
        cwd=ROOT,
        env={
            **bench.env,
            "SLURM_JOB_ID": "5",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_RESTART_COUNT": str(restarts),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == (74 if code == 134 else code), result.stderr
    assert result.stdout == "0,1,2,3\n"
    assert bench.calls("python") == [[*bench.train, AWKWARD]]
    assert bench.calls("scontrol") == ([["requeue", "5"]] if requeued else [])


# gpus.sh


def test_one_host_trains_on_its_gpus_and_begins_again(bench):
    bench.stub("nvidia-smi")
    bench.ends(75, 143)
    result = bench.launch("gpus.sh", *bench.run, "--gpus=0,2", "--", AWKWARD)
    assert result.returncode == 0, result.stderr
    assert bench.calls("python") == [[*bench.train, AWKWARD]] * 3
    assert bench.calls("nvidia-smi")[0][:2] == ["-i", "0,2"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 130, 137])
def test_a_fault_is_not_begun_again(bench, code):
    bench.stub("nvidia-smi")
    bench.ends(code, 0)
    assert bench.launch("gpus.sh", *bench.run).returncode == code
    assert len(bench.calls("python")) == 1


def test_new_checkpoints_are_why_a_run_is_not_given_up(bench):
    bench.stub("nvidia-smi")
    steps = f'n=$(wc -l < "$BENCH/ends"); mkdir -p "{bench.workdir}/checkpoints/$((99 - n / 3))"'
    bench.stub("python", steps + PYTHON)
    bench.ends(*[75] * 8)
    assert bench.launch("gpus.sh", *bench.run).returncode == 0
    assert len(bench.calls("python")) == 9


def test_a_signal_saves_and_ends_it(bench):
    # A shell's background job ignores SIGINT, which a launcher under it cannot trap.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signals_end(bench)
    finally:
        signal.signal(signal.SIGINT, before)


def signals_end(bench):
    bench.stub("nvidia-smi")
    bench.stub("python", SLOW)
    command = bench.command("gpus.sh", *bench.run)
    for sent in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, env=bench.env) as launcher:
            wait_for(lambda: len(bench.calls("python")) == 1)
            launcher.send_signal(sent)
            assert launcher.wait(timeout=20) == 143
        assert (bench.folder / "saved").exists()
        assert len(bench.calls("python")) == 1  # not begun again
        (bench.folder / "saved").unlink()
        (bench.folder / "calls").unlink()


def test_a_second_run_in_a_workdir_is_refused(bench):
    bench.stub("nvidia-smi")
    bench.stub("python", SLOW)
    command = bench.command("gpus.sh", *bench.run)
    with subprocess.Popen(command, env=bench.env) as first:
        wait_for(lambda: len(bench.calls("python")) == 1)
        second = bench.launch("gpus.sh", *bench.run)
        assert second.returncode == 2
        assert f"a run is under way in {bench.workdir}" in second.stderr
        first.terminate()
        assert first.wait(timeout=20) == 143


@pytest.mark.parametrize(
    "smi, complaint",
    [("echo '88, python'", "in use by 88, python"), ("exit 9", "finds no GPU")],
)
def test_gpus_that_are_busy_or_absent_are_refused(bench, smi, complaint):
    bench.stub("nvidia-smi", smi)
    result = bench.launch("gpus.sh", *bench.run)
    assert result.returncode == 2 and complaint in result.stderr
    assert bench.calls("python") == []
