"""Heads and their meeting point over real connections, without models: what is brought, and what comes back."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import meet
from parallel.elastic import ElasticHeads
from parallel.meeting_line import GivenUp, MeetingLost
from parallel.meeting_outcome import Brought, decoded
from parallel.meeting_server import MeetingServer
from parallel.meeting_terms import Lease, Terms
from relora.compression import decode, encode
from relora.errors import ConfigError
from relora.heads import Compression, Parcel, Way
from relora.lte import LteConfig

TERMS = Terms(
    identity="a",
    layout="b",
    heads=2,
    quorum=1,
    wait_seconds=0.5,
    silence_seconds=2.0,
    sync_every=2,
    steps=8,
    batch=3,
    positions=1,
)
ENTRIES = 77


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def meeting(tmp_path, port):
    """A running meeting point; returns its address."""
    server = MeetingServer(tmp_path / "meeting", token="word", keep_bytes=1, say=lambda text: None)
    loops = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve("127.0.0.1", port)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield f"127.0.0.1:{port}"
    loops[0].call_soon_threadsafe(server.stop)
    thread.join(10.0)


def join(runtime, address, compression=Compression.none, token="word", terms=TERMS):
    config = LteConfig(heads=terms.heads, meeting=address, compression=compression)
    heads = ElasticHeads(runtime, config, terms, token=token, checkpoint=0, wanted=None, era=0, patience_seconds=5.0)
    heads.admission()
    return heads


def both(*tasks):
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [one.result(30.0) for one in [pool.submit(task) for task in tasks]]


def own(head, sync):
    return torch.randn(ENTRIES, generator=torch.Generator().manual_seed(10 * sync + head))


def parcels(value, compression, residual=None):
    common = {"entries": ENTRIES, "own": lambda: [value], "alike": True, "compression": compression}
    return [
        Parcel(name="a", way=Way.gather, **common),
        Parcel(name="b", way=Way.mean, replicas=1, residuals=None if residual is None else [residual], **common),
    ]


def sync(heads, value, compression=Compression.none, residual=None, weight=1.0):
    """One exchange; returns members, both results, and the products."""
    delivery = heads.exchange(parcels(value, compression, residual), [[weight, 0.5]])
    rows, (mean,) = delivery.result(), delivery.result()
    return delivery.members, torch.stack(rows), mean, delivery.products()


@pytest.mark.parametrize("compression", Compression)
def test_a_meeting_point_without_torch_decodes_what_heads_encode(compression):
    values = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.zeros(40), torch.ones(7)])
    values[300] = torch.inf
    data = encode(values, compression)
    brought = Brought(
        mean=True, entries=len(values), compression=compression.value, share=1.0, told={}, data=data.numpy().tobytes()
    )
    assert np.array_equal(decoded(brought), decode(data, len(values), compression).numpy(), equal_nan=True)


@pytest.mark.parametrize("compression", [Compression.none, Compression.int8])
def test_all_heads_get_the_same_bits_of_every_parcel_and_the_mean_by_weights(runtime, meeting, compression):
    first, second = both(*[lambda: join(runtime, meeting, compression)] * 2)
    values = {heads.number: own(heads.number, 1) for heads in (first, second)}
    assert set(values) == {0, 1}
    for heads in (first, second):
        lease = heads.after(0)
        assert (lease.sync, lease.steps, lease.ranges) == (1, 2, [(6 * heads.number, 6 * heads.number + 6)])
    results = both(
        *[
            lambda heads=heads: sync(heads, values[heads.number], compression, weight=1.0 + heads.number)
            for heads in (first, second)
        ]
    )
    sent = [decode(encode(values[head], compression), ENTRIES, compression) for head in (0, 1)]
    for members, rows, mean, products in results:
        assert members == [0, 1]
        assert torch.equal(rows, torch.stack(sent))
        assert torch.equal(mean, results[0][2])
        assert torch.allclose(mean, sent[0] / 3 + sent[1] * 2 / 3, atol=1e-6)
        exact = torch.stack(sent).double()
        assert torch.allclose(products, exact @ exact.t())
    for heads in (first, second):
        heads.goodbye("left")


def test_a_late_head_gets_what_it_missed_and_keeps_what_rounding_had_kept_back(runtime, meeting):
    first, second = both(*[lambda: join(runtime, meeting, Compression.bf16)] * 2)
    for heads in (first, second):
        heads.after(0)
    value, residual = own(first.number, 1), torch.full((ENTRIES,), 0.25)
    members, rows, mean, _ = sync(first, value, Compression.bf16)
    assert members == [first.number]
    late_members, late_rows, late_mean, _ = sync(second, own(second.number, 1), Compression.bf16, residual)
    assert (late_members, late_rows.shape) == (members, (1, ENTRIES))
    assert torch.equal(late_rows, rows)
    assert torch.equal(late_mean, mean)
    assert torch.equal(residual, torch.full((ENTRIES,), 0.25)), "nothing of it has arrived"
    lease = second.after(1)
    assert isinstance(lease, Lease)
    assert lease.sync == 2
    first.after(1)
    results = both(
        *[lambda heads=heads: sync(heads, own(heads.number, 2), Compression.bf16) for heads in (first, second)]
    )
    assert [members for members, *_ in results] == [[0, 1]] * 2
    for heads in (first, second):
        heads.goodbye("left")


def test_a_head_that_missed_more_than_is_kept_joins_anew_with_the_state_of_another(runtime, meeting, tmp_path):
    first, second = both(*[lambda: join(runtime, meeting)] * 2)
    for heads in (first, second):
        heads.after(0)
    for index in (1, 2):
        sync(first, own(first.number, index))
        first.after(index)
    with pytest.raises(GivenUp):
        sync(second, own(second.number, 1))  # one byte is kept, and the last sync
    again = threading.Thread(target=second.come_again)
    again.start()
    again.join(10.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.admission)
        time.sleep(0.2)
        sync(first, own(first.number, 3))
        assert first.decision.joined == [second.number]
        assert first.decision.provider == first.number
        first.hand_over(3, [({"name": "w"}, b"abc"), ({"name": "v"}, b"")])
        assert waiting.result(10.0).joins
    assert [(header["name"], bytes(data)) for header, data in second.take_over()] == [("w", b"abc"), ("v", b"")]
    assert first.decision.returned == [(6 * second.number, 6 * second.number + 6)]
    ledger = json.loads((tmp_path / "meeting/ledger.json").read_text())
    assert ledger["sync"] == 3
    for heads in (first, second):
        heads.goodbye("left")


def test_a_broken_connection_is_made_again_and_the_reply_goes_on(runtime, meeting):
    first, second = both(*[lambda: join(runtime, meeting)] * 2)
    for heads in (first, second):
        heads.after(0)

    def cut_off():
        delivery = second.exchange(parcels(own(second.number, 1), Compression.none), [[1.0, 0.5]])
        rows = delivery.result()
        second.line._connection.socket.shutdown(socket.SHUT_RDWR)
        (mean,) = delivery.result()
        delivery.products()
        return delivery.members, torch.stack(rows), mean

    whole, cut = both(lambda: sync(first, own(first.number, 1)), cut_off)
    assert whole[0] == cut[0] == [0, 1]
    assert torch.equal(whole[1], cut[1])
    assert torch.equal(whole[2], cut[2])
    for heads in (first, second):
        heads.goodbye("left")


def test_strangers_and_other_runs_are_refused_by_name(runtime, meeting):
    with pytest.raises(ConfigError, match="ACCRETE_MEETING_TOKEN"):
        join(runtime, meeting, token="guess")
    first = ThreadPoolExecutor(1).submit(lambda: join(runtime, meeting, terms=replace(TERMS, heads=1)))
    first.result(10.0)
    with pytest.raises(ConfigError, match="sync_every is 2 in the run that meets here and 4 in this head"):
        join(runtime, meeting, terms=replace(TERMS, heads=1, sync_every=4))
    first.result().goodbye("left")


def test_without_a_meeting_point_a_head_says_where_it_looked(runtime, port):
    config = LteConfig(meeting=f"127.0.0.1:{port}")
    with pytest.raises(MeetingLost, match=f"127.0.0.1:{port} cannot be reached"):
        ElasticHeads(runtime, config, TERMS, token="", checkpoint=0, wanted=None, era=0, patience_seconds=0.2)


def test_heads_that_see_the_folder_find_the_meeting_point_by_it_wherever_it_is_now(runtime, meeting, tmp_path):
    folder = tmp_path / "meeting"
    limit = time.monotonic() + 10
    while not (folder / "address").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert (folder / "address").read_text().strip() == meeting
    (folder / "address").write_text("127.0.0.1:1\n")
    later = threading.Timer(0.3, (folder / "address").write_text, [meeting + "\n"])
    later.start()
    head = join(runtime, str(folder))
    assert head.number == 0
    head.goodbye("is done")


def test_the_command_needs_no_torch_and_refuses_a_port_in_use(tmp_path, port):
    program = "import sys, launch.meet, parallel.meeting_server; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
    with socket.create_server(("127.0.0.1", port)):
        words = [sys.executable, "-m", "launch.meet", "--folder", str(tmp_path), "--host", "127.0.0.1"]
        done = subprocess.run(
            [*words, "--port", str(port)], cwd=root, capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "led', "is damaged"),
        ('{"format": 1, "ledger": {}}', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 9}', "has format 9, and this version reads 1"),
    ],
)
def test_a_ledger_that_cannot_be_read_is_named_and_left_as_it_is(tmp_path, text, message, capsys):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    assert meet.main(["--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} {message}" in error
    assert error.count("\n") == 1
    assert path.read_text() == text
