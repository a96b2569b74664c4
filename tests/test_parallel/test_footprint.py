"""The arithmetic of memory and traffic; what engines really do is compared in test_launch/test_plan.py."""

import pytest
import torch
import torch.distributed as dist

from parallel.footprint import Gathering, Held, Kind, Role, footprint, trainable_entries
from parallel.pretence import counted_collectives, imagined_axis, sent_by_tensor_axis
from parallel.tensor_layers import summed
from parallel.traffic import factor_bytes, sent, step_traffic
from parallel.zero import Offload, ParallelConfig, deepspeed_config

BASE, FACTOR, DENSE, NORM = 1 << 20, 1 << 16, 1 << 18, 1 << 8
HELD = [
    Held(name="embed", entries=DENSE, role=Role.dense, group="dense"),
    Held(name="layer.weight", entries=BASE, role=Role.base, group=None, extra_bits=True, adapter_rank=64),
    Held(name="layer.down", entries=FACTOR, role=Role.factor, group="down"),
    Held(name="layer.up", entries=FACTOR, role=Role.factor, group="up"),
    Held(name="norm", entries=NORM, role=Role.dense, group="dense_no_decay"),
    Held(name="other", entries=NORM, role=Role.frozen, group=None),
]
TRAINABLE = DENSE + 2 * FACTOR + NORM


def settings_of(parallel, *, bf16=True, on_gpu=True):
    return deepspeed_config(
        parallel, bf16=bf16, microbatch_size=1, max_grad_norm=1.0, trainable=TRAINABLE, on_gpu=on_gpu
    )


def at(stage, *, data=4, bf16=True, held=HELD, microbatches=1, **options):
    parallel = ParallelConfig(zero_stage=stage, **options)
    return footprint(held, parallel, settings_of(parallel, bf16=bf16), data=data, microbatches=microbatches)


def test_trainable_entries_are_those_with_an_optimizer_group():
    assert trainable_entries(HELD) == TRAINABLE


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("stage", range(4))
def test_frozen_weights_cost_their_own_bytes_and_extra_bits_only(stage, bf16):
    with_frozen, without = at(stage, bf16=bf16), at(stage, bf16=bf16, held=[one for one in HELD if one.group])
    parts = 4 if stage == 3 else 1
    width = 2 if bf16 else 4
    more = (BASE + NORM) // parts * width + BASE // parts * 2
    whole_copy = NORM * width if stage == 3 else 0  # a small one stays whole
    assert with_frozen.resident - without.resident == more + whole_copy


def test_fp32_replicas_take_sixteen_bytes_a_trained_entry():
    plain = at(0, bf16=False)
    assert plain.resident == 16 * TRAINABLE + 6 * BASE + 4 * NORM  # the tests' base has extra bits even here
    assert Kind.masters not in plain.device


def test_bf16_replicas_take_eighteen_bytes_a_trained_entry():
    assert at(0).resident == 18 * TRAINABLE + 4 * BASE + 2 * NORM


@pytest.mark.parametrize(("stage", "kind"), [(1, Kind.masters), (1, Kind.moments), (2, Kind.gradients)])
def test_each_stage_partitions_one_kind_more(stage, kind):
    for data in (2, 4, 8):
        assert at(stage, data=data).device[kind] * data == pytest.approx(at(stage, data=1).device[kind], rel=1e-3)
    below = at(stage - 1, data=4).device[kind]
    assert below > 2 * at(stage, data=4).device[kind]


def test_stage_three_partitions_weights_and_extra_bits():
    four, two = at(3, data=4), at(3, data=2)
    assert four.device[Kind.base] == BASE // 4 * 2
    assert four.device[Kind.extra_bits] == BASE // 4 * 2
    assert two.device[Kind.factors] == 2 * four.device[Kind.factors]
    assert at(2, data=4).device[Kind.base] == BASE * 2


def test_uneven_sizes_are_padded_for_every_process():
    odd = [Held(name="a", entries=1001, role=Role.dense, group="dense")]
    assert at(2, data=4, held=odd).device[Kind.masters] == 4 * 1008 // 4
    assert at(3, data=4, held=odd).device[Kind.masters] == 4 * 251


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_leaves_the_device_and_is_on_the_host(stage):
    here, there = at(stage), at(stage, offload=Offload.optimizer)
    for kind in (Kind.masters, Kind.moments):
        assert kind not in there.device
        assert there.host[kind] == here.device[kind]
    assert here.on_host == 0


def test_offloaded_weights_leave_the_device_too():
    there = at(3, offload=Offload.all)
    assert Kind.base not in there.device
    assert there.host[Kind.base] == BASE // 4 * 2


def test_buckets_follow_the_engines_dictionary():
    small = {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert at(3, deepspeed=small).device[Kind.buffers] < at(3).device[Kind.buffers]
    assert at(2, deepspeed=small).in_backward < at(2).in_backward


def test_stage_three_keeps_small_parameters_whole_and_gathers_the_others():
    section = {"stage3_param_persistence_threshold": FACTOR, "stage3_prefetch_bucket_size": 0}
    gathering = Gathering(HELD, section, data=2)
    assert gathering.kept == 2 * FACTOR + 2 * NORM
    assert gathering.passing == BASE + DENSE
    assert Gathering(HELD, section, data=1).passing == 0
    near = Gathering(HELD, {**section, "stage3_max_reuse_distance": 0}, data=2)
    assert near.live == BASE < gathering.live == BASE + DENSE


def test_one_process_sends_nothing_on_its_data_axis():
    for stage in range(4):
        parallel = ParallelConfig(zero_stage=stage)
        assert step_traffic(HELD, parallel, settings_of(parallel), data=1, microbatches=3) == {}


def test_traffic_of_each_stage():
    def of(stage, microbatches=2):
        parallel = ParallelConfig(zero_stage=stage)
        return step_traffic(HELD, parallel, settings_of(parallel), data=4, microbatches=microbatches)

    assert of(0) == {"summed": 4 * TRAINABLE}
    assert of(1) == {"summed": 2 * TRAINABLE, "gathered": 2 * TRAINABLE}
    assert of(2) == {"summed": 2 * 2 * TRAINABLE, "gathered": 2 * TRAINABLE}
    assert of(3)["scattered"] == 2 * 2 * TRAINABLE
    assert of(3, 4)["gathered"] > 1.5 * of(3, 2)["gathered"] > of(2)["gathered"]


def test_a_ring_sends_sums_twice_and_nothing_when_alone():
    assert sent({"summed": 800, "gathered": 80, "scattered": 8}, 4) == 1200 + 60 + 6
    assert sent({"summed": 800}, 1) == 0
    assert sent_by_tensor_axis(800, 10, 4) == 1200 + 30
    assert factor_bytes(HELD) == 4 * 2 * FACTOR


def test_collectives_are_counted_and_not_made():
    real = dist.all_reduce
    with counted_collectives() as tally:
        value = torch.ones(6)
        assert torch.equal(summed(value, imagined_axis(2)), torch.ones(6))
    assert (tally.all_reduced, tally.gathered) == (24, 0)
    assert dist.all_reduce is real
