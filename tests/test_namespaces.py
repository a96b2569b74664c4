"""Sites in network namespaces: where they are permitted, what they do; everywhere, the wire and the refusals."""

import socket
import sys
from pathlib import Path

import pytest

from benchmarks import lte_link, namespaces
from benchmarks.namespaces import Link, address, environment, sites
from benchmarks.outcome import read_document
from relora.errors import ConfigError

ROOT = Path(__file__).parent.parent


def packet(receiver, size):
    """Just enough of an IPv4 packet."""
    head = bytearray(20)
    head[0], head[16:20] = 0x45, bytes(map(int, address(receiver).split(".")))
    return bytes(head) + bytes(size - 20)


@pytest.fixture
def wire():
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    for ours, _ in ends:
        ours.setblocking(False)
    links = [Link(bandwidth=1e6, latency=0.5), Link(bandwidth=1e6, latency=0.1), Link(bandwidth=1e5, latency=0.1)]
    yield namespaces._Wire([ours.fileno() for ours, _ in ends], links), [theirs for _, theirs in ends]
    for pair in ends:
        for one in pair:
            one.close()


def test_packets_leave_one_after_the_other_and_arrive_late(wire):
    carrier, stacks = wire
    stacks[0].send(packet(1, 1000))
    stacks[0].send(packet(1, 2000))
    carrier._take(0)
    (first, *_), (second, *_) = sorted(carrier._waiting)
    assert second - first == pytest.approx(2000 / 1e6)
    assert carrier.sent == [3000, 0, 0]
    carrier._deliver(first - 0.4)
    assert len(carrier._waiting) == 2, "half a second is their latency"
    carrier._deliver(second)
    assert [len(stacks[1].recv(5000)) for _ in range(2)] == [1000, 2000]


def test_a_slow_receiver_slows_all_that_send_to_it(wire):
    carrier, stacks = wire
    for sender in (0, 1):
        stacks[sender].send(packet(2, 1000))
        carrier._take(sender)
    arrived = {number: late - carrier._links[number - 1].latency for late, number, *_ in carrier._waiting}
    assert arrived[2] - arrived[1] == pytest.approx(1000 / 1e5)


def test_what_goes_nowhere_is_dropped(wire):
    carrier, stacks = wire
    stacks[0].send(packet(7, 1000))
    stacks[0].send(b"\x60" + bytes(60))  # IPv6
    carrier._take(0)
    assert not carrier._waiting


def test_without_permission_one_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(namespaces, "_TUN", namespaces.Path("/nowhere/tun"))
    with (
        pytest.raises(ConfigError, match=r"not permitted here.*run as root") as refused,
        sites([Link(bandwidth=1e6, latency=0)]),
    ):
        pass
    assert "sites need" in str(refused.value)


def test_without_tools_they_are_named(monkeypatch):
    monkeypatch.setattr(namespaces.shutil, "which", lambda name, path: None)
    with pytest.raises(ConfigError, match="sites need ip, nsenter, unshare"), sites([Link(bandwidth=1e6, latency=0)]):
        pass


SERVE = "import socket; s = socket.create_server(('', 5)); print('up', flush=True); c, _ = s.accept(); n = 0\n"
SERVE += "while b := c.recv(65536): n += len(b)\nprint(n)"
SEND = f"import socket; socket.create_connection(('{address(0)}', 5)).sendall(bytes(300000))"


def test_sites_reach_each_other_and_their_bytes_are_counted():
    try:
        with sites([Link(bandwidth=1e8, latency=0.001)] * 2) as made:
            server = made.start(0, [sys.executable, "-c", SERVE], stdout=-1, text=True)
            assert server.stdout.readline() == "up\n"
            assert made.run(1, [sys.executable, "-c", SEND]).returncode == 0
            assert server.communicate()[0] == "300000\n"
            assert 300_000 < made.sent(1) < 330_000
            assert made.sent(0) < 30_000
    except ConfigError as error:
        pytest.skip(str(error))


def test_processes_in_sites_know_their_device_and_the_first_site():
    assert environment()["GLOO_SOCKET_IFNAME"] == namespaces.DEVICE
    assert environment()["MASTER_ADDR"] == address(0)


def test_the_links_table_has_predictions_beside_measurements():
    row = {"link": "slow", "heads": 2, "way": "mean", "compression": "none", "parcels": 3, "bytes": 1e6}
    predicted = lte_link._predicted(row, Link(bandwidth=1e6, latency=0.01), 2)
    assert predicted == pytest.approx(1.0 + 2 * 0.01 * (3 * 2 + 2))
    shown = lte_link.table([{**row, "seconds": 2 * predicted, "predicted": predicted}])
    assert (
        shown.splitlines()[-1]
        == "| slow, 2 heads | mean |        none |      1.00 |       1.160 |      2.320 |  2.00 |"
    )


def test_the_document_shows_the_figures_of_the_json_file():
    shown = (ROOT / "docs/results/lte_link.md").read_text(encoding="utf-8").splitlines()
    for line in lte_link.table(read_document(ROOT / "benchmarks/results/lte_link.json")["rows"]).splitlines():
        assert line in shown
