"""Parcels between heads on every grouping of processes against a slow plain computation, to the bit and to the byte."""

import functools
import itertools
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from parallel.exchange import HeadExchange
from parallel.mpi_carrier import MpiCarrier
from parallel.runtime import start
from parallel.sync_traffic import (
    Load,
    SyncedLayer,
    SyncLayout,
    closing_bytes,
    dense_load,
    exchange_bytes,
    factors_are_fewer,
    gradient_bytes,
    layer_load,
    load_bytes,
    opening_bytes,
    period_bytes,
)
from relora.compression import decode, encode
from relora.dense import DenseGradients
from relora.errors import ConfigError
from relora.heads import Compression, Parcel, Way
from relora.lte import Exchange
from tests.test_launch.test_start import environment, mpirun

WEIGHTS = [3.0, 1.0, 0.0, 4.0]
GATHERED, AVERAGED, FED_BACK = 70, 75, 139


def _values(seed, entries, head, data):
    generator = torch.Generator().manual_seed(1000 * seed + 10 * head + data)
    return torch.randn(entries, generator=generator) * (1 + head)


def _words(head, weighted):
    return [WEIGHTS[head] if weighted else 0.3, 0.1 * head, -7.0]


def _parcels(exchange, data, alike, compression, residuals):
    """One of each kind, as one process brings them; the gathered tensors differ in length."""
    place = 0 if alike else data

    def own(seed, entries):
        return [_values(seed, entries(head), head, place) for head in exchange.hosted]

    settings = {"alike": alike, "compression": compression}
    replicas = 2 if alike else 1
    return [
        Parcel(
            name="gathered",
            way=Way.gather,
            entries=GATHERED,
            own=lambda: own(1, lambda head: GATHERED - 9 * head),
            **settings,
        ),
        Parcel(name="nothing", way=Way.gather, entries=0, own=lambda: own(2, lambda head: 0), **settings),
        Parcel(
            name="averaged",
            way=Way.mean,
            entries=AVERAGED,
            own=lambda: own(3, lambda head: AVERAGED),
            replicas=replicas,
            **settings,
        ),
        Parcel(
            name="fed back",
            way=Way.mean,
            entries=FED_BACK,
            own=lambda: own(4, lambda head: FED_BACK),
            residuals=residuals,
            **settings,
        ),
    ]


def _exchanged(world, groups, heads, alike, compression, weighted, background, by_mpi=False):
    """Outcomes of two exchanges, residuals, products, words, weights and bytes of this process."""
    with start(heads=groups) as runtime:
        exchange = HeadExchange(runtime, heads=heads, carrier=MpiCarrier(runtime) if by_mpi else None)
        residuals = [torch.zeros(FED_BACK) for _ in exchange.hosted]
        words = [_words(head, weighted) for head in exchange.hosted]
        outcomes = []
        for _ in range(2):
            parcels = _parcels(exchange, runtime.data.index, alike, compression, residuals)
            delivery = exchange.exchange(parcels, words, background=background)
            outcomes += [torch.stack(delivery.result()) for _ in parcels]
            products = delivery.products()
        assert delivery.members == list(range(heads))
        return outcomes, residuals, products, delivery.words, delivery.weights, exchange.sent


def _rounded(values, compression):
    return decode(encode(values, compression), len(values), compression)


@functools.cache
def _plain(heads, data, alike, compression, weighted):
    """The same by the rules alone, for the process of some data index of each head."""
    parts = 2 if alike and data is not None else 1
    place = 0 if alike else data or 0
    weights = [one / sum(WEIGHTS[:heads]) for one in WEIGHTS[:heads]] if weighted else [1 / heads] * heads
    block = 32 if compression in (Compression.fp8, Compression.int8) else 1
    residuals = [torch.zeros(FED_BACK) for _ in range(heads)]
    outcomes = []
    for _ in range(2):
        rows = [torch.zeros(GATHERED) for _ in range(heads)]
        for head, row in enumerate(rows):
            row[: GATHERED - 9 * head] = _values(1, GATHERED - 9 * head, head, place)
        outcomes += [torch.stack([_rounded(row, compression) for row in rows]), torch.zeros(heads, 0)]
        sent = [_rounded(_values(3, AVERAGED, head, place), compression) for head in range(heads)]
        products = torch.stack(sent).double() @ torch.stack(sent).double().t()
        outcomes.append(_rounded(_plain_mean(sent, weights, weighted).float(), compression)[None])
        own = [_values(4, FED_BACK, head, place) + residuals[head] for head in range(heads)]
        sent = [_rounded(one, compression) for one in own]
        exact = _plain_mean(sent, weights, weighted)
        mean = _rounded(exact.float(), compression)
        residuals = [one - two for one, two in zip(own, sent, strict=True)]
        share = FED_BACK if parts == 1 else -(-FED_BACK // (parts * block)) * block
        piece = -(-share // (heads * block)) * block
        for entry in range(FED_BACK):
            averaging = entry % share // piece
            if weights[averaging]:
                missed = (exact - mean)[entry] / weights[averaging]
                residuals[averaging][entry] = (residuals[averaging][entry].double() + missed).float()
        outcomes.append(mean[None])
    return outcomes, residuals, products


def _plain_mean(rows, weights, weighted):
    total = torch.zeros(len(rows[0]), dtype=torch.float64)
    for row, weight in zip(rows, weights, strict=True):
        total += row.double() * weight if weighted else row.double()
    return total if weighted else total / len(rows)


def _planned(layout, alike, compression):
    sizes = [(Way.gather, GATHERED), (Way.gather, 0), (Way.mean, AVERAGED), (Way.mean, FED_BACK)]
    loads = [Load(way=way, entries=entries, alike=alike, compression=compression) for way, entries in sizes]
    return exchange_bytes(layout, loads, words=3)


def _check(results, groups, heads, alike, compression, weighted):
    data = len(results) // groups
    layout = SyncLayout(heads=heads, groups=groups, data=data)
    shares = sum(result[2] for result in results[:data])
    grams = 0
    for rank, (outcomes, residuals, _, words, weights, sent) in enumerate(results):
        group, index = divmod(rank, data)
        expected, kept, gram = _plain(heads, index if data > 1 else None, alike, compression, weighted)
        assert all(torch.equal(one, two) for one, two in zip(outcomes, expected, strict=True))
        for place, residual in enumerate(residuals):
            assert torch.equal(residual, kept[group * layout.hosted + place])
        assert words == [_words(head, weighted) for head in range(heads)]
        assert weights == pytest.approx([w[0] / sum(words[0] for words in words) for w in words])
        assert sent == 2 * _planned(layout, alike, compression)
        grams = grams + gram if group == 0 else grams
    # Alike parts are held by two processes, whose shares sum to one; one process has half of it.
    torch.testing.assert_close(shares, grams / 2 if alike else grams)


LAYOUTS = [
    # processes, groups, heads, alike
    (1, 1, 1, True),
    (1, 1, 4, True),
    (2, 2, 2, True),
    (2, 2, 4, False),
    (4, 4, 4, True),
    (4, 2, 2, True),
    (4, 2, 2, False),
]


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize(("count", "groups", "heads", "alike"), LAYOUTS)
def test_parcels_arrive_as_a_plain_computation_says_to_the_bit_and_the_byte(
    on_processes, count, groups, heads, alike, compression
):
    for weighted in (False, True):
        results = on_processes(_exchanged, count, groups, heads, alike, compression, weighted, False)
        _check(results, groups, heads, alike, compression, weighted)


@pytest.mark.parametrize(("count", "groups", "heads", "alike"), [(1, 1, 4, True), (2, 2, 4, True), (4, 2, 2, True)])
def test_the_background_changes_no_bit(on_processes, count, groups, heads, alike):
    """The plain computation is the foreground's, too."""
    results = on_processes(_exchanged, count, groups, heads, alike, Compression.int8, True, True)
    _check(results, groups, heads, alike, Compression.int8, True)


def test_an_exact_mean_of_equal_heads_is_the_sum_over_their_number():
    rows = [_values(3, AVERAGED, head, 0) for head in range(3)]
    with start() as runtime:
        exchange = HeadExchange(runtime, heads=3)
        parcel = Parcel(name="", way=Way.mean, entries=AVERAGED, own=lambda: rows, alike=True)
        delivery = exchange.exchange([parcel], [[5.0]] * 3)
        mean = delivery.result()[0]
    assert torch.equal(mean, ((rows[0].double() + rows[1].double() + rows[2].double()) / 3).float())
    assert exchange.sent == 0


@pytest.mark.parametrize("compression", [Compression.bf16, Compression.fp8, Compression.int8])
def test_with_feedback_nothing_is_lost_and_without_it_means_drift(runtime, compression):
    heads, entries, syncs = 3, 100, 200
    weights = [1.0, 2.0, 5.0]
    changes = [_values(5, entries, head, 0) * torch.logspace(-4, 0, entries) for head in range(heads)]
    exact = sum(w * change.double() for w, change in zip(weights, changes, strict=True)) / 8 * syncs
    errors = {}
    for feeds_back in (True, False):
        exchange = HeadExchange(runtime, heads=heads)
        residuals = [torch.zeros(entries) for _ in range(heads)] if feeds_back else None
        parcel = Parcel(
            name="", way=Way.mean, entries=entries, own=lambda: changes, alike=True, compression=compression,
            residuals=residuals,
        )  # fmt: skip
        total = torch.zeros(entries, dtype=torch.float64)
        for _ in range(syncs):
            total += exchange.exchange([parcel], [[weight] for weight in weights]).result()[0]
        held = sum(w * r.double() for w, r in zip(weights, residuals, strict=True)) / 8 if feeds_back else 0
        torch.testing.assert_close(total + held, exact, rtol=1e-4, atol=1e-5) if feeds_back else None
        errors[feeds_back] = (total - exact).abs().max()
    assert errors[True] < errors[False] / 20


def test_parcels_are_made_one_by_one_in_the_foreground_and_all_at_once_in_the_background(runtime):
    made = []

    def parcel(number):
        def own():
            made.append((number, threading.current_thread() is threading.main_thread()))
            return [torch.ones(3)] * 2

        return Parcel(name="", way=Way.mean, entries=3, own=own, alike=True)

    exchange = HeadExchange(runtime, heads=2)
    delivery = exchange.exchange([parcel(0), parcel(1)], [[1.0]] * 2)
    assert made == []
    delivery.result()
    assert made == [(0, True)]
    delivery.result()
    assert made == [(0, True), (1, True)]
    delivery = exchange.exchange([parcel(2), parcel(3)], [[1.0]] * 2, background=True)
    delivery.result()
    delivery.result()
    delivery.products()
    assert made[2:] == [(2, False), (3, False)]


def test_training_goes_on_while_a_parcel_is_on_its_way(runtime):
    trained = threading.Event()

    def own():
        return [torch.full((3,), float(trained.wait(30)))]

    exchange = HeadExchange(runtime, heads=1)
    parcel = Parcel(name="", way=Way.mean, entries=3, own=own, alike=True)
    delivery = exchange.exchange([parcel], [[1.0]], background=True)
    trained.set()
    assert delivery.result()[0].tolist() == [1.0] * 3


def test_what_fails_in_the_background_is_raised_by_every_wait_after_it(runtime):
    def fails():
        raise ValueError("no such factors")

    def parcel(own):
        return Parcel(name="", way=Way.mean, entries=3, own=own, alike=True)

    exchange = HeadExchange(runtime, heads=1)
    parcels = [parcel(lambda: [torch.ones(3)]), parcel(fails), parcel(lambda: [torch.ones(3)])]
    delivery = exchange.exchange(parcels, [[1.0]], background=True)
    assert delivery.result()[0].tolist() == [1.0] * 3
    for _ in range(2):
        with pytest.raises(ValueError, match="no such factors"):
            delivery.result()
    with pytest.raises(ValueError, match="no such factors"):
        delivery.products()
    with pytest.raises(ValueError, match="no such factors"):
        exchange.exchange([], [[1.0]])


def test_bytes_are_what_the_formulas_of_the_docs_say():
    apart = SyncLayout(heads=4, groups=4)
    for compression, width in ((Compression.none, 4), (Compression.bf16, 2), (Compression.int8, 33 / 32)):
        gather = Load(way=Way.gather, entries=6400, alike=True, compression=compression)
        mean = Load(way=Way.mean, entries=6400, alike=True, compression=compression)
        assert load_bytes(apart, gather) == 3 * 6400 * width
        assert load_bytes(apart, mean) == 2 * 3 * 1600 * width
        half = SyncLayout(heads=4, groups=4, data=2)
        assert load_bytes(half, gather) == 3 * 3200 * width
    assert opening_bytes(apart, 5) + closing_bytes(apart) == 3 * (5 + 16) * 8
    assert exchange_bytes(SyncLayout(heads=4, groups=1), [gather, mean], words=5) == 0


def test_the_crossover_is_where_heads_times_rank_reaches_twice_the_harmonic_size():
    for heads, (out, inputs) in itertools.product((2, 4, 8), ((64, 64), (128, 32))):
        crossover = 2 * out * inputs / (out + inputs) / heads
        for rank, compression in itertools.product(range(1, 65), Compression):
            sizes = (rank * (out + inputs), out * inputs)
            layout = SyncLayout(heads=heads, groups=heads)
            assert factors_are_fewer(layout, *sizes, alike=True, compression=compression) == (rank <= crossover)


@pytest.mark.parametrize("compression", Compression)
def test_a_layer_travels_by_the_fewer_bytes_whoever_hosts_its_head(runtime, compression):
    for data, alike in ((1, True), (4, True), (4, False)):
        layout = SyncLayout(heads=8, groups=8, data=data)
        for factors in (100, 1900, 2100, 5000):
            layer = SyncedLayer(factors=factors, up=factors // 2, part=8000, alike=alike)
            sent = {way: load_bytes(layout, layer_load(layout, layer, way, compression)) for way in Exchange}
            assert sent[Exchange.auto] == min(sent[Exchange.factors], sent[Exchange.dense])
            up = Load(way=Way.mean, entries=factors // 2, alike=True, compression=compression)
            assert sent[Exchange.shared] == load_bytes(layout, up)
    for choice, factors in itertools.product(Exchange, (100, 5000)):
        apart = SyncLayout(heads=8, groups=8)
        layer = SyncedLayer(factors=factors, up=factors // 2, part=8000, alike=True)
        exchange = HeadExchange(runtime, heads=8, choice=choice, compression=compression)
        by_factors = layer_load(apart, layer, choice, compression).way is Way.gather
        assert exchange.by_factors(factors, 8000, alike=True) == by_factors


def _period(world, heads, fragments, delayed):
    """Bytes that a process sends in one period, layers by turns factors and dense, and dense parameters."""
    with start(heads=2) as runtime:
        exchange = HeadExchange(runtime, heads=heads)
        words = [[1.0, 2.0]] * len(exchange.hosted)

        def parcel(load):
            sizes = {key: getattr(load, key) for key in Load.__slots__}
            return Parcel(name="", own=lambda: [torch.ones(load.entries)] * len(exchange.hosted), **sizes)

        loads, dense = _loads(), dense_load(33, alike=False, compression=Compression.fp8)
        for fragment in range(fragments):
            ours = [parcel(load) for load in loads[fragment::fragments]]
            last = [parcel(load) for load in dense] if fragment == fragments - 1 else []
            delivery = exchange.exchange(ours + ([] if delayed else last), words, background=delayed)
            for _ in range(len(ours) + (0 if delayed else len(last))):
                delivery.result()
            delivery.products()
            if delayed and last:
                exchange.exchange(last, words).result()
        return exchange.sent


def _shared(world, alike):
    """Bytes that a process sends in one step for gradients of dense parameters."""
    with start(heads=2) as runtime:
        exchange = HeadExchange(runtime, heads=2)
        gradients = DenseGradients(exchange, alike=alike)
        assert gradients.agree(True)
        gradients.average([torch.ones(3, 5), torch.ones(2)])
        return exchange.sent


@pytest.mark.parametrize("alike", [True, False])
def test_gradients_of_a_step_send_what_is_planned(on_processes, alike):
    planned = gradient_bytes(SyncLayout(heads=2, groups=2, data=2), 17, alike=alike)
    assert on_processes(_shared, 4, alike) == [planned] * 4


def _loads():
    settings = {"alike": True, "compression": Compression.fp8}
    return [Load(way=way, entries=20 + 37 * n, **settings) for n, way in enumerate([Way.gather, Way.mean] * 2)]


@pytest.mark.parametrize(("fragments", "delayed"), [(1, False), (3, False), (3, True)])
def test_a_period_of_fragments_sends_what_is_planned(on_processes, fragments, delayed):
    layout = SyncLayout(heads=4, groups=2)
    dense = dense_load(33, alike=False, compression=Compression.fp8)
    planned = period_bytes(layout, _loads(), dense, fragments=fragments, delayed=delayed, words=2)
    assert on_processes(_period, 2, 4, fragments, delayed) == [planned] * 2
    without = period_bytes(layout, _loads(), [], fragments=fragments, delayed=delayed, words=2)
    assert planned - without == sum(load_bytes(layout, load) for load in dense) + (2 * 2 * 8 if delayed else 0)


def _under_mpi():
    """What mpirun starts on two processes: MPI against torch.distributed, and what it refuses."""
    with start(heads=2) as runtime:
        for compression, background in ((Compression.none, False), (Compression.fp8, False), (Compression.int8, True)):
            settings = (2, 4, False, compression, True, background)
            by_torch, by_mpi = (_exchanged(runtime, *settings, by_mpi) for by_mpi in (False, True))
            for one, two in zip(by_torch[0] + by_torch[1], by_mpi[0] + by_mpi[1], strict=True):
                assert torch.equal(one, two)
            assert torch.equal(by_torch[2], by_mpi[2])
            assert by_torch[3:] == by_mpi[3:]
            assert by_mpi[-1] == 2 * _planned(SyncLayout(heads=4, groups=2), False, compression)
        with pytest.raises(ConfigError, match=r"start it by that library's mpirun.*or choose lte\.transport=torch"):
            MpiCarrier(replace(runtime, process_rank=1 - runtime.process_rank))
        carrier = MpiCarrier(runtime)
        carrier._threads = False
        with pytest.raises(ConfigError, match=r"lte\.delay needs MPI calls from a second thread"):
            HeadExchange(runtime, heads=2, carrier=carrier).exchange([], [[1.0]], background=True)
        sys.stdout.write(f"process {runtime.process_rank}: the same\n")


def test_mpi_carries_the_same_bits_and_bytes():
    command = [mpirun(), "-n", "2", sys.executable, __file__]
    ran = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(ran.stdout.splitlines()) == [f"process {rank}: the same" for rank in range(2)]


if __name__ == "__main__":
    _under_mpi()
