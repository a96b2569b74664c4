import pytest

from parallel.zero import BUCKET_ENTRIES, Offload, ParallelConfig, deepspeed_config
from relora.errors import ConfigError


def settings(parallel=None, **changes):
    options = {"bf16": False, "microbatch_size": 2, "max_grad_norm": 0.5, "trainable": 1000, "on_gpu": False}
    return deepspeed_config(parallel or ParallelConfig(), **options | changes)


def test_bf16_gradients_are_summed_in_fp32_and_accumulation_is_the_callers():
    config = settings(bf16=True)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["bf16"]["enabled"]
    assert config["gradient_clipping"] == 0.5
    assert config["managed_gradient_accumulation"] is False
    assert config["zero_optimization"]["stage"] == 1, "where DeepSpeed keeps fp32 masters"


def test_stage_zero_in_fp32_has_no_zero_and_no_clipping_of_deepspeeds():
    config = settings()
    assert config["gradient_clipping"] == 0.0, "left out, DeepSpeed clips to 1"
    assert not {"bf16", "zero_optimization"} & set(config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_no_larger_than_what_trains(stage):
    section = settings(ParallelConfig(zero_stage=stage), trainable=1000)["zero_optimization"]
    assert (section["stage"], section["reduce_bucket_size"]) == (stage, 1000)
    large = settings(ParallelConfig(zero_stage=stage), trainable=10**12)["zero_optimization"]
    assert large["reduce_bucket_size"] == BUCKET_ENTRIES


def test_communication_overlaps_on_gpus_where_gradients_are_partitioned():
    overlaps = [
        settings(ParallelConfig(zero_stage=s), on_gpu=True)["zero_optimization"]["overlap_comm"] for s in (1, 2, 3)
    ]
    assert overlaps == [False, True, True]


def test_offload_moves_the_optimizer_or_everything():
    optimizer = settings(ParallelConfig(zero_stage=2, offload=Offload.optimizer))["zero_optimization"]
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "offload_param" not in optimizer
    everything = settings(ParallelConfig(zero_stage=3, offload=Offload.all), on_gpu=True)["zero_optimization"]
    assert everything["offload_optimizer"] == everything["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_raw_keys_come_on_top_of_derived_ones():
    raw = {"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": True}}
    config = settings(ParallelConfig(zero_stage=2, deepspeed=raw))
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2
    assert config["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 4}, "parallel.zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"tensor": 0}, "parallel.tensor must be at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "parallel.timeout_seconds must be above 0, got 0.0"),
        ({"offload": Offload.optimizer}, "parallel.offload=optimizer needs parallel.zero_stage=1 or more, got 0"),
        ({"zero_stage": 2, "offload": Offload.all}, "parallel.offload=all needs parallel.zero_stage=3 or more, got 2"),
        ({"deepspeed": 3}, "parallel.deepspeed must be a mapping, got 3"),
        ({"tensor_plan": "x"}, "parallel.tensor_plan must be a mapping, got 'x'"),
        (
            {"deepspeed": {"train_batch_size": 8}},
            "parallel.deepspeed.train_batch_size=8 is not yours to set: set training",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1}}},
            "zero_optimization.stage=1 is not yours to set: set parallel",
        ),
        ({"deepspeed": {"zero_optimization": 1}}, "parallel.deepspeed.zero_optimization must be a mapping, got 1"),
        (
            {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}},
            "restarts and checkpoints do not work with it; leave it out",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as error:
        ParallelConfig(**changes)
    assert message in str(error.value)
