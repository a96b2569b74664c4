"""A real SLURM cluster on one machine: slurmctld and several slurmd, each node in namespaces of its own.

A node has its own name, address and process ids, so that killing it looks as on a real cluster; all share the file
system. The cluster lives in the process-id namespace of a process that reads orders from a pipe: when the other end
closes, however it ends, that process ends, and every daemon and job with it.
"""

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

NETWORK = "10.78.0"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "ip", "mount")
INSTALL = "apt-get install slurm-wlm munge iproute2 libpmix-dev"
CONF = """\
ClusterName=test
SlurmctldHost=ctl({network}.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
# PMIx keeps its sockets there, and nodes share /tmp.
TmpFS={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
# Long, as on a site: tests say themselves when SLURM notices that a node is lost.
SlurmdTimeout=300
SlurmctldTimeout=10
TCPTimeout=2
KillWait=20
MessageTimeout=10
BatchStartTimeout=20
ReturnToService=2
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{count}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


class Unavailable(Exception):
    """There can be no cluster here, and why."""


class Cluster:
    """Orders to the process that holds the cluster."""

    def __init__(self, count: int = 3) -> None:
        missing = [name for name in TOOLS if shutil.which(name, path=PATH) is None]
        if missing:
            raise Unavailable(f"no {', '.join(missing)} here: {INSTALL}")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: it holds a Unix socket
        _lay_out(self.folder, count)
        ordinary = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
        command = [
            "unshare",
            *ordinary,
            *_APART,
            "--",
            sys.executable,
            __file__,
            "cluster",
            str(self.folder),
            str(count),
        ]
        self._log = (self.folder / "log/cluster").open("w")
        self._process = subprocess.Popen(
            [*command, str(os.getuid()), str(os.getgid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PATH": PATH},
        )
        try:
            self._wait_for_nodes(count)
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, cwd=None, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess:
        """Run a command where SLURM's own commands reach the cluster."""
        order = {"run": command, "cwd": str(cwd or self.folder), "environment": environment, "seconds": seconds}
        return subprocess.CompletedProcess(command, *self._order(order))

    def ask(self, *command: str) -> str:
        """What a command prints; it must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def power_off(self, node: int) -> None:
        """Kill every process of a node at once; SLURM does not know of it."""
        self._order({"kill": node})

    def notice(self, node: int) -> None:
        """Let SLURM know that a node is lost, as its own look or an administrator would in time."""
        self.ask("scontrol", "update", f"NodeName=n{node}", "State=DOWN", "Reason=lost")

    def power_on(self, node: int) -> None:
        """Start a node again, and wait until jobs may come."""
        before = self._started(node)
        self._order({"start": node})
        limit = time.monotonic() + 40
        while self._started(node) == before or "IDLE" not in self.ask("scontrol", "show", "node", f"n{node}"):
            assert time.monotonic() < limit, f"node {node} does not come back"
            time.sleep(0.2)

    def hurry(self, number: str) -> None:
        """Start soon what SLURM puts off for two minutes after a requeue.

        Not before the last start's processes are gone, nor within the second in which they were ended: SLURM would take
        their end for the new start's.
        """
        pending = ["squeue", "-h", "-t", "PENDING", "-j", number, "-o", "%A %V %r"]
        for row in self.ask(*pending).splitlines():
            own, requeued, reason = row.split(maxsplit=2)
            ago = datetime.now() - datetime.fromisoformat(requeued)
            if reason == "BeginTime" and ago.total_seconds() > 2 and not _has_steps(own):
                self.run("scontrol", "update", f"JobId={own}", "StartTime=now")

    def words_on(self, number: str) -> str:
        """What SLURM's daemons have noted on a job."""
        rows = [
            f"{path.name}: {row}"
            for path in sorted(self.folder.glob("log/slurm*"))
            for row in path.read_text(errors="replace").splitlines()
            if re.search(rf"\b{number}\b", row)
        ]
        return "\n".join(rows)

    def _started(self, node: int) -> str:
        return re.findall(r"SlurmdStartTime=\S+", self.ask("scontrol", "show", "node", f"n{node}"))[0]

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _order(self, order: dict) -> list:
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            log = (self.folder / "log/cluster").read_text(errors="replace").strip()
            raise Unavailable(f"the cluster is gone, or its namespaces are not permitted here: {log[-400:]}")
        return json.loads(answer)

    def _wait_for_nodes(self, count: int) -> None:
        limit = time.monotonic() + 40
        while True:
            found = self.run("sinfo", "--noheader", "--Node", "-p", "low", "--states", "idle", "-o", "%N")
            if len(found.stdout.split()) == count:
                return
            if time.monotonic() > limit:
                logs = [f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in self.folder.glob("log/*")]
                raise Unavailable(f"SLURM's daemons do not come up here: {found} {logs}")
            time.sleep(0.2)


_APART = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _has_steps(job: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                return True
    return False


def _lay_out(folder: Path, count: int) -> None:
    for name in ("state", "log", "spool", "munge"):
        (folder / name).mkdir(mode=0o700 if name == "munge" else 0o755)
    folder.chmod(0o755)
    key = folder / "munge/key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    user = getpass.getuser()
    conf = CONF.format(folder=folder, user=user, network=NETWORK, count=count)
    (folder / "slurm.conf").write_text(conf)
    hosts = [f"{NETWORK}.1 ctl", *(f"{_address(node)} n{node}" for node in range(1, count + 1))]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
    # Names come from the hosts file only: a name server that cannot be reached costs seconds for each look-up.
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    version = subprocess.run(["slurmd", "-V"], check=True, text=True, capture_output=True, env={"PATH": PATH}).stdout
    if int("".join(c if c.isdigit() else " " for c in version).split()[0]) >= 23:
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")  # it starts even with proctrack/linuxproc


def _address(node: int) -> str:
    return f"{NETWORK}.{10 + node}"


class Holder:
    """Process 1 of the cluster's namespaces: starts daemons, nodes and commands."""

    def __init__(self, folder: Path, user: int, group: int) -> None:
        self.folder = folder
        as_user = ["unshare", "--user", f"--map-user={user}", f"--map-group={group}", "--"]
        self.user = [] if user == 0 else as_user  # drops the root of the namespace
        self.nodes: dict[int, subprocess.Popen] = {}
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def begin(self, count: int) -> None:
        """Bring everything up."""
        _sh("hostname ctl; mount --make-rprivate /; ip link set lo up")
        _sh(f"mount --bind {self.folder}/hosts /etc/hosts; mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf")
        _sh(f"ip link add br0 type bridge; ip addr add {NETWORK}.1/24 dev br0; ip link set br0 up")
        files = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        socket = f"--socket={self.folder}/munge/socket"
        subprocess.run([*self.user, "munged", "--force", *files, socket], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*self.user, "slurmctld", "-c"], check=True, stdout=subprocess.DEVNULL)
        for node in range(1, count + 1):
            self.start(node)

    def start(self, node: int) -> None:
        """Power a node on."""
        command = ["unshare", *_APART, "--", sys.executable, __file__, "node", str(self.folder), str(node), *self.user]
        apart = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        apart.stdout.readline()  # it is in its own network by now
        self.nodes[node] = apart
        _sh(f"ip link del v{node} 2>/dev/null || true")
        _sh(f"ip link add v{node} type veth peer name eth0 netns {apart.pid}; ip link set v{node} master br0 up")
        apart.stdin.write("go\n")
        apart.stdin.flush()

    def kill(self, node: int) -> None:
        """Power a node off."""
        self.nodes[node].send_signal(signal.SIGKILL)
        self.nodes.pop(node).wait()

    def run(self, command: list, cwd: str, environment: dict, seconds: float) -> list:
        """A command's code, output and errors."""
        try:
            done = subprocess.run(
                [*self.user, *command], check=False, cwd=cwd, env={**os.environ, **environment}, timeout=seconds,
                text=True, errors="replace", capture_output=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return [124, str(error.stdout or ""), f"no end within {seconds} s"]
        return [done.returncode, done.stdout, done.stderr]

    def serve(self) -> None:
        """Take orders until nobody can give any."""
        for row in sys.stdin:
            order = json.loads(row)
            answer: list = []
            if "run" in order:
                answer = self.run(order["run"], order["cwd"], order["environment"], order["seconds"])
            elif "kill" in order:
                self.kill(order["kill"])
            else:
                self.start(order["start"])
            print(json.dumps(answer), flush=True)


def live_as_node(folder: Path, node: int, user: list[str]) -> None:
    """Process 1 of a node."""
    print("apart", flush=True)
    sys.stdin.readline()
    _sh(f"hostname n{node}; mount --make-rprivate /; mount -t tmpfs -o mode=1777 shm /dev/shm; ip link set lo up")
    _sh(f"ip addr add {_address(node)}/24 dev eth0; ip link set eth0 up; ip route add default via {NETWORK}.1")
    (folder / f"spool/n{node}").mkdir(exist_ok=True)
    daemon = subprocess.Popen([*user, "slurmd", "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while daemon.returncode is None:  # and of all orphans
        child, status = os.wait()
        if child == daemon.pid:
            daemon.returncode = status


def _sh(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    role, where, number, *rest = sys.argv[1:]
    if role == "node":
        live_as_node(Path(where), int(number), rest)
    else:
        holder = Holder(Path(where), int(rest[0]), int(rest[1]))
        holder.begin(int(number))
        holder.serve()
