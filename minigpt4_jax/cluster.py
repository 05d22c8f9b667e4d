"""Which processes are one run: found in the environment, called together, told to JAX.

A single process needs nothing of this. Of several, each calls process 0 at the address
where JAX's service will listen afterwards: JAX waits for those that are absent too, but
then aborts without naming them. The connections stay, for the watchdog.
"""

import ctypes
import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax._src.clusters import ClusterEnv

from minigpt4_jax.errors import ClusterError, InputError

logger = logging.getLogger(__name__)

# A plain list of hosts: the same program on each, with these set.
COORDINATOR = "MINIGPT4_JAX_COORDINATOR"  # host:port of process 0
PROCESSES = "MINIGPT4_JAX_PROCESSES"  # how many there are
PROCESS = "MINIGPT4_JAX_PROCESS"  # which one this is, from 0
ADVICE = (
    f"want {COORDINATOR}=HOST:PORT of process 0, {PROCESSES}=how many there are and "
    f"{PROCESS}=which one this is, from 0"
)

HELLO = "minigpt4-jax"
LONGEST = 1 << 20  # bytes of a message
GRACE = 5  # seconds for which process 0 may be later than this one to give up


@dataclass(frozen=True)
class Place:
    """One process of several.

    Attributes:
        address: host:port of process 0.
        devices: the only local devices of this process; None: all.
        hosts: of all processes where the environment lists them, else "".
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    hosts: str = ""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def name(self, index: int) -> str:
        """A process in a message, its host included where it is known."""
        hosts = self.hosts.split(",")
        known = hosts[index] if len(hosts) == self.count else ""
        return f"process {index}" + (f" ({known})" if known else "")


@dataclass
class Team:
    """The processes of a run, connected: process 0 with each of the others.

    Attributes:
        hosts: name of each process's host.
        lines: by process; those that this one is connected with.
    """

    index: int
    hosts: list[str]
    lines: dict[int, "Line"] = field(default_factory=dict)

    def name(self, index: int) -> str:
        return f"process {index} ({self.hosts[index]})"


class Line:
    """Messages (JSON objects, one a line) over a socket that is never waited for.

    Attributes:
        open: False once the other side is gone, or says what is no message.
    """

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        self.socket = connected
        self.open = True
        self._in = self._out = b""

    def send(self, **message: Any) -> None:
        """Nothing is sent to one who does not read."""
        if len(self._out) < LONGEST:
            self._out += json.dumps(message).encode() + b"\n"
        try:
            self._out = self._out[self.socket.send(self._out) :]
        except OSError:  # its buffer is full, or it is gone, which `receive` finds
            pass

    def receive(self) -> list[dict[str, Any]]:
        """What has come since."""
        try:
            while data := self.socket.recv(1 << 16):
                self._in += data
            self.open = False
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._in = self._in.split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            found = [None]
        if len(self._in) > LONGEST or not all(isinstance(m, dict) for m in found):
            self.open = False
            return []
        return found

    def close(self) -> None:
        self.open = False
        self.socket.close()


def wait(lines: Iterable[Line], timeout_s: float, *others: socket.socket) -> None:
    """Until something has come over a line, or at another socket."""
    with selectors.DefaultSelector() as selector:
        for waited in (*others, *(line.socket for line in lines if line.open)):
            selector.register(waited, selectors.EVENT_READ)
        selector.select(max(timeout_s, 0))


def start(start_s: float, limit_s: float) -> Team | None:
    """Make this process one of several where the environment says so; None: it is alone.

    Comes before anything that asks JAX for a device.

    Args:
        start_s: how long the others may take to come.
        limit_s: after which the watchdog ends a run; JAX's own checks come later.

    Raises:
        InputError: the environment contradicts itself, or another process's.
        ClusterError: naming the processes that did not come.
    """
    if jax.distributed.is_initialized():
        return None
    place = find(start_s)
    if place is None:
        return None
    team = gather(place, start_s) if place.index == 0 else call(place, start_s)
    if place.index:
        _delay_abort()
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        place.devices,
        cluster_detection_method="deactivate",  # it was detected
        initialization_timeout=int(start_s) + 60,  # it aborts, and all have come
        heartbeat_timeout_seconds=int(2 * limit_s) + 60,  # it aborts, names no host
    )
    logger.info("%s of %d", team.name(place.index), place.count)
    return team


def find(start_s: float) -> Place | None:
    """This process's place in its cluster; None when it is alone.

    Our own variables come first, then what JAX detects: Open MPI, SLURM (srun), TPUs of
    GKE and of Compute Engine, one slice or several, and indexed jobs of Kubernetes.
    """
    if any(name in os.environ for name in (COORDINATOR, PROCESSES, PROCESS)):
        return _listed()
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    on_tpu = "TPU_WORKER_HOSTNAMES" in os.environ
    if in_pod and not on_tpu and "JOB_COMPLETION_INDEX" not in os.environ:
        return None  # no indexed job, for which JAX would ask the API server
    step = os.environ.get("SLURM_STEP_NUM_TASKS")  # of a job that may have several
    try:
        address, count, index, devices = (
            ClusterEnv.auto_detect_unset_distributed_params(
                os.environ.get("JAX_COORDINATOR_ADDRESS"),
                int(step) if step else None,
                None,
                None,
                None,
                int(start_s),
            )
        )
    except (RuntimeError, OSError) as error:
        raise ClusterError(
            f"the cluster does not say which processes there are ({error}); {ADVICE}"
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"the cluster's environment is not understood ({error!r}); {ADVICE}"
        ) from error
    if address is None or count is None or index is None or count < 2:
        return None
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:  # JAX reads it
        devices = None
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return Place(address, count, index, tuple(devices) if devices else None, hosts)


def _listed() -> Place | None:
    """By our own variables."""
    values = {n: os.environ.get(n, "") for n in (COORDINATOR, PROCESSES, PROCESS)}
    host, _, port = values[COORDINATOR].rpartition(":")
    numbers = (port, values[PROCESSES], values[PROCESS])
    if (
        not host
        or not all(n.isascii() and n.isdecimal() for n in numbers)
        or not 0 < int(port) < 1 << 16
        or not int(values[PROCESS]) < int(values[PROCESSES])
    ):
        got = ", ".join(f"{name}={value}" for name, value in values.items())
        raise InputError(f"got {got}; {ADVICE}")
    count, index = int(values[PROCESSES]), int(values[PROCESS])
    return Place(values[COORDINATOR], count, index) if count > 1 else None


# Process 0 gathers, the others call.


def gather(place: Place, start_s: float) -> Team:
    """Wait for all others, and tell each who is still awaited and when all are there."""
    until = time.monotonic() + start_s
    team = Team(0, [socket.gethostname()] + [""] * (place.count - 1))
    unknown: list[Line] = []
    with _listen(place, until) as server:
        while absent := [i for i in range(1, place.count) if i not in team.lines]:
            left = until - time.monotonic()
            if left <= 0:
                _tell(team, absent=absent)
                raise _absent(place, absent, start_s)
            lines = [*unknown, *team.lines.values()]
            wait(lines, left, server)
            unknown += _accepted(server)
            for line in unknown:
                for hello in line.receive()[:1]:
                    _enter(team, place, line, hello)
            for index, line in list(team.lines.items()):
                line.receive()
                if not line.open:  # it may be started again
                    del team.lines[index]
            entered = list(team.lines.values())
            unknown = [a for a in unknown if a.open and a not in entered]
            _tell(team, awaited=[i for i in absent if i not in team.lines])
    for line in unknown:
        line.close()
    _tell(team, hosts=team.hosts)
    return team


def call(place: Place, start_s: float) -> Team:
    """Call process 0 until it answers, and wait until all are there."""
    until = time.monotonic() + start_s
    awaited = [0]
    while (left := until - time.monotonic()) > 0:
        line = _connected(place, min(left, 5))
        if line is None:
            time.sleep(min(left, 0.2))
            continue
        line.send(
            hello=HELLO,
            process=place.index,
            of=place.count,
            host=socket.gethostname(),
        )
        while line.open and (left := until + GRACE - time.monotonic()) > 0:
            wait([line], left)
            for message in line.receive():
                if "hosts" in message:
                    return Team(place.index, message["hosts"], {0: line})
                if "absent" in message:
                    raise _absent(place, message["absent"], start_s)
                if "refused" in message:
                    raise InputError(message["refused"])
                awaited = message.get("awaited", awaited)
        if line.open:  # process 0 has stopped
            awaited = [0]
        line.close()
        time.sleep(0.2)
    raise _absent(place, awaited, start_s)


def _absent(place: Place, absent: list[int], start_s: float) -> ClusterError:
    names = ", ".join(place.name(i) for i in absent)
    at = f" at {place.address}" if 0 in absent else ""
    return ClusterError(
        f"{names} of {place.count} did not come{at} within {start_s:g} s "
        "(config.watchdog.start_s); are all started, and does the network let them reach "
        f"{place.address}?"
    )


def _listen(place: Place, until: float) -> socket.socket:
    """Where JAX's service will listen; waits for a process that is leaving."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{place.port}")
    host, _, port = bind.rpartition(":")
    dual = socket.has_dualstack_ipv6() and host in ("", "[::]")
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    address = ("" if dual else host.strip("[]"), int(port))
    told = False
    while True:
        try:
            server = socket.create_server(address, family=family, dualstack_ipv6=dual)
            server.setblocking(False)
            return server
        except OSError as error:
            if time.monotonic() > until:
                raise ClusterError(
                    f"process 0 cannot listen at port {port} ({error}); end what does, "
                    f"or give another port in {COORDINATOR} or JAX_COORDINATOR_PORT"
                ) from error
            if not told:
                logger.warning("port %s: %s; trying on", port, error)
                told = True
            time.sleep(0.2)


def _accepted(server: socket.socket) -> list[Line]:
    found = []
    try:
        while True:
            found.append(Line(server.accept()[0]))
    except OSError:  # no more
        return found


def _enter(team: Team, place: Place, line: Line, hello: dict) -> None:
    """Enter a process that has come, or refuse it."""
    index, of = hello.get("process"), hello.get("of")
    if hello.get("hello") != HELLO or not isinstance(index, int):
        line.close()
    elif of != place.count or not 0 < index < place.count:
        line.send(
            refused=f"process {index} of {of} has come, process 0 is of {place.count}; "
            "want the same number in each process"
        )
    elif index in team.lines:
        line.send(
            refused=f"process {index} has come twice, from {team.hosts[index]} and "
            f"{hello.get('host')}; want another number in each process"
        )
    else:
        team.hosts[index] = str(hello.get("host"))
        team.lines[index] = line


def _tell(team: Team, **message: Any) -> None:
    for line in team.lines.values():
        line.send(**message)


def _connected(place: Place, timeout_s: float) -> Line | None:
    try:
        found = socket.create_connection((place.host, place.port), timeout_s)
    except OSError:  # process 0 or its name is not there yet
        return None
    if found.getsockname() == found.getpeername():
        # TCP lets a caller on the same host meet itself where nobody listens.
        found.close()
        return None
    return Line(found)


def _delay_abort() -> None:
    """Give the watchdog some seconds to say that process 0 is gone.

    JAX's client aborts at once when it loses the service of process 0. C's sleep as the
    handler of SIGABRT takes the signal's number for seconds, 6; then abort() goes on.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    except (AttributeError, OSError, TypeError):  # another system's C library
        pass
