"""Sites on one machine: network namespaces joined by links of a known bandwidth and latency.

Each site has one network device, whose packets this process carries to the other sites: each at its turn, no faster
than the sender's and the receiver's link allow, and late by the latency. Unlike tc's netem that needs no module of the
kernel but TUN. Nothing outlives the process, however it ends: namespaces are held by a child that reads from it.
"""

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.errors import ConfigError

DEVICE = "link0"
"""Name of the network device inside a site."""
PORT = 29400
_NETWORK = (10, 77, 0)
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SMALLEST_PACKET, _LARGEST_PACKET, _PACKETS_PER_SECOND = 1500, 65000, 1000
_TOOLS = ("ip", "nsenter", "unshare")
_SETTINGS = {
    "tcp_congestion_control": "reno",  # all kernels have it; on a link that loses nothing it is soon at full rate
    "tcp_slow_start_after_idle": "0",  # training pauses between syncs; each would start slowly again
    "tcp_rmem": "4096 1048576 67108864",  # windows that fill a fast link of high latency
    "tcp_wmem": "4096 1048576 67108864",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What joins a site to the others."""

    bandwidth: float
    """Bytes per second, each way at the same time."""
    latency: float
    """Seconds from this site to another, one way."""


class Sites:
    """Network namespaces that reach one another; made by `sites`."""

    def __init__(self, holders: Sequence["subprocess.Popen[bytes]"], wire: "_Wire", tools: Mapping[str, str]) -> None:
        self._holders, self._wire, self._tools = holders, wire, tools

    def sent(self, site: int) -> int:
        """Bytes that a site has sent to others so far, headers of TCP/IP included."""
        return self._wire.sent[site]

    def start(
        self, site: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command inside a site; `env` comes on top of this process's environment and of `environment`."""
        around = {**os.environ, **environment(), **(env or {})}
        return subprocess.Popen([*self._inside(site), *command], env=around, **popen)

    def run(
        self, site: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> "subprocess.CompletedProcess[Any]":
        """Run a command inside a site to its end."""
        process = self.start(site, command, env=env, **popen)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _inside(self, site: int) -> list[str]:
        return [self._tools["nsenter"], f"--net=/proc/{self._holders[site].pid}/ns/net"]


def address(site: int) -> str:
    """The address of a site."""
    return ".".join(map(str, (*_NETWORK, site + 1)))


def environment() -> dict[str, str]:
    """What torch.distributed needs to know inside a site, ranks aside; the main process belongs into site 0."""
    return {"GLOO_SOCKET_IFNAME": DEVICE, "MASTER_ADDR": address(0), "MASTER_PORT": str(PORT)}


@contextmanager
def sites(links: Sequence[Link]) -> Iterator[Sites]:
    """Within it there is a site for each link.

    Raises:
        ConfigError: network namespaces or TUN devices are not permitted here, or their tools are missing.
    """
    tools = _tools()
    with ExitStack() as stack:
        holders, devices = [], []
        packet = max(_SMALLEST_PACKET, min(_LARGEST_PACKET, int(min(one.bandwidth for one in links) / 1000)))
        for number in range(len(links)):
            holder = stack.enter_context(_namespace(tools))
            file, name = _device()
            stack.callback(os.close, file)
            _move(tools, holder.pid, name, address(number), packet)
            holders.append(holder)
            devices.append(file)
        wire = stack.enter_context(_carried(devices, links))
        yield Sites(holders, wire, tools)


def _tools() -> dict[str, str]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = {name: shutil.which(name, path=path) for name in _TOOLS}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise ConfigError(f"sites need {', '.join(missing)}, of iproute2 or util-linux: install what is missing")
    return {name: where for name, where in found.items() if where is not None}


@contextmanager
def _namespace(tools: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A child in a network namespace of its own, which ends when this process lets go of its input."""
    command = [tools["unshare"], "--net", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if not holder.stdout.readline():
                raise _refused("a network namespace", holder.stderr.read().decode().strip())
            yield holder
        finally:
            holder.stdin.close()


def _device() -> tuple[int, str]:
    """A new TUN device, as long as the file is open."""
    try:
        file = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        asked = struct.pack("16sH22x", b"accrete%d", _IFF_TUN | _IFF_NO_PI)
        given = fcntl.ioctl(file, _TUNSETIFF, asked)
    except OSError as error:
        raise _refused(f"a TUN device ({_TUN})", error.strerror or "") from error
    return file, given[:16].rstrip(b"\0").decode()


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(
        f"sites need {what}, which is not permitted here ({why}): run as root on Linux, in a container with "
        "--cap-add=NET_ADMIN --device /dev/net/tun"
    )


def _move(tools: Mapping[str, str], pid: int, name: str, place: str, packet: int) -> None:
    """Put a device into a namespace and bring it up."""
    ip = tools["ip"]
    settings = "; ".join(f"echo '{value}' > /proc/sys/net/ipv4/{key}" for key, value in _SETTINGS.items())
    inside = (
        f"{ip} link set {name} name {DEVICE}; {ip} address add {place}/24 dev {DEVICE}; {ip} link set lo up; "
        f"{ip} link set {DEVICE} mtu {packet} txqueuelen 10000 up; {settings}"
    )
    commands = [
        [ip, "link", "set", name, "netns", str(pid)],
        [tools["nsenter"], f"--net=/proc/{pid}/ns/net", "sh", "-e", "-c", inside],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused("a network device of their own", done.stderr.strip())


class _Wire:
    """Carries packets between devices."""

    def __init__(self, devices: Sequence[int], links: Sequence[Link]) -> None:
        self._devices, self._links = devices, links
        self.sent = [0] * len(devices)
        self._out, self._in = [0.0] * len(devices), [0.0] * len(devices)  # when each direction of a link is free
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def carry(self, stop: int) -> None:
        """Carry until `stop` can be read."""
        poll = select.poll()
        for file in (*self._devices, stop):
            poll.register(file, select.POLLIN)
        sites = {file: site for site, file in enumerate(self._devices)}
        while True:
            pause = self._waiting[0][0] - time.monotonic() if self._waiting else 1.0
            ready = poll.poll(max(0.0, pause) * 1000)
            for file, _ in ready:
                if file == stop:
                    return
                self._take(sites[file])
            self._deliver(time.monotonic())

    def _take(self, site: int) -> None:
        """Take the packets that a site has sent."""
        while True:
            try:
                packet = os.read(self._devices[site], _LARGEST_PACKET + 1)
            except BlockingIOError:
                return
            receiver = packet[19] - 1 if packet[0] >> 4 == 4 and tuple(packet[16:19]) == _NETWORK else -1
            if not 0 <= receiver < len(self._devices):
                continue
            now, size = time.monotonic(), len(packet)
            self.sent[site] += size
            gone = max(now, self._out[site]) + size / self._links[site].bandwidth
            self._out[site] = gone
            arrived = max(gone, self._in[receiver] + size / self._links[receiver].bandwidth)
            self._in[receiver] = arrived
            self._count += 1
            heapq.heappush(self._waiting, (arrived + self._links[site].latency, self._count, receiver, packet))

    def _deliver(self, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(self._waiting)
            try:
                os.write(self._devices[receiver], packet)
            except BlockingIOError:
                continue  # a full receiver loses packets, as a network does


@contextmanager
def _carried(devices: Sequence[int], links: Sequence[Link]) -> Iterator[_Wire]:
    wire = _Wire(devices, links)
    ear, mouth = os.pipe()
    thread = threading.Thread(target=wire.carry, args=(ear,), daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        os.write(mouth, b".")
        thread.join()
        os.close(ear)
        os.close(mouth)
