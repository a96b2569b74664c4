import pytest

from parallel.hostlist import expand
from parallel.launchers import Announcement, announced, has_agent, own_words, rank_in
from relora.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
# As SLURM 22.05 sets them.
STEP = {
    "SLURM_JOB_ID": "40",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n[2-3]",
    "SLURM_STEP_NUM_TASKS": "4",
}
BATCH = {"SLURM_JOB_ID": "40", "SLURM_JOB_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}


def test_without_a_launcher_there_is_one_process():
    assert announced({}) == Announcement()


def test_torchrun_and_deepspeed_are_told_apart():
    said = announced(TORCHRUN)
    assert said == Announcement(
        launcher="torchrun", process_rank=3, world_size=4, local_rank=1, address="n1", port=29500
    )
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
    assert announced({**deepspeed, "CROSS_SIZE": "1"}).launcher == "deepspeed"


def test_a_step_meets_at_its_own_first_host():
    said = announced(STEP)
    assert (said.launcher, said.process_rank, said.world_size, said.local_rank) == ("srun", 2, 4, 0)
    assert said.address == "n2"
    assert 15000 <= said.port < 30000


def test_steps_of_one_job_and_neighbouring_jobs_meet_at_different_ports():
    starts = [{**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (40, 41) for step in (0, 1)]
    assert len({announced(start).port for start in starts}) == 4


def test_a_step_on_one_machine_resolves_no_name():
    assert announced({**STEP, "SLURM_STEP_NODELIST": "n7"}).address == "127.0.0.1"


def test_a_meeting_point_set_by_hand_overrules_slurm_and_mpi():
    by_hand = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"}
    for environment in (STEP, OPEN_MPI, MPICH):
        said = announced({**environment, **by_hand})
        assert (said.address, said.port) == ("10.0.0.9", 1234)


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH])
def test_mpirun_leaves_the_address_to_mpi(environment):
    said = announced(environment)
    assert (said.process_rank, said.world_size, said.local_rank, said.address) == (1, 2, 1, None)


def test_the_innermost_launcher_counts():
    assert announced({**STEP, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2"}).launcher == "mpirun (Open MPI)"
    assert announced({**STEP, **TORCHRUN}).launcher == "torchrun"
    assert announced({**OPEN_MPI, **TORCHRUN}).launcher == "torchrun"


def test_an_mpi_plugin_of_srun_changes_nothing():
    pmi2 = {**STEP, "PMI_RANK": "2", "PMI_SIZE": "4"}
    wrong = {**STEP, "PMI_RANK": "0", "PMI_SIZE": "1"}
    assert announced(pmi2) == announced(wrong) == announced({**STEP, "PMIX_RANK": "2"}) == announced(STEP)


def test_a_batch_script_with_one_task_is_one_process():
    assert announced(BATCH) == announced({**BATCH, "SLURM_NTASKS": "1"}) == Announcement()
    one_task = {**STEP, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert announced({**one_task, **alone}).world_size == 1


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_plain_python_in_a_batch_script_of_many_tasks_is_refused(step):
    with pytest.raises(ConfigError, match=r"8 tasks.*srun python"):
        announced({**BATCH, **step, "SLURM_NTASKS": "8"})


def test_torchrun_may_be_started_from_such_a_script():
    assert announced({**BATCH, "SLURM_NTASKS": "8", **TORCHRUN}).world_size == 4


@pytest.mark.parametrize("inner", [{**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"}, {**OPEN_MPI}, {**MPICH}])
def test_separate_runs_in_one_step_are_refused(inner):
    with pytest.raises(ConfigError, match=r"4 tasks, but .* announces 2 processes"):
        announced({**STEP, **inner})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**TORCHRUN, "RANK": "four"}, "RANK must be a whole number, got 'four'"),
        ({**TORCHRUN, "RANK": "4"}, "process 4 of 4"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "process 3 of 0"),
        ({**TORCHRUN, "MASTER_PORT": "-1"}, "MASTER_PORT must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT"),
        ({**OPEN_MPI, "MASTER_ADDR": "n1"}, "MASTER_PORT is not"),
        ({**OPEN_MPI, "WORLD_SIZE": "3"}, "2 processes, but WORLD_SIZE=3"),
        ({**STEP, "SLURM_STEP_NODELIST": "n[1-"}, "no list of hosts"),
        ({**STEP, "SLURM_STEP_NODELIST": "n[a-b]"}, "no range of hosts"),
    ],
)
def test_contradictions_and_wrong_numbers_are_named(environment, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        announced(environment)


@pytest.mark.parametrize(
    ("compact", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("n1,n2", ["n1", "n2"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("a[1,3-4]-ib,b-2", ["a1-ib", "a3-ib", "a4-ib", "b-2"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_compact_lists_of_hosts_are_written_out(compact, hosts):
    assert expand(compact) == hosts


def test_only_a_launchers_processes_depend_on_their_parent():
    by_hand = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
    assert not has_agent({})
    assert not has_agent(by_hand)
    assert not has_agent(BATCH)
    assert all(has_agent(environment) for environment in (TORCHRUN, OPEN_MPI, MPICH, STEP))


def test_who_speaks_is_known_before_anything_is_checked():
    found = [rank_in(environment) for environment in ({}, TORCHRUN, OPEN_MPI, MPICH, STEP, {"RANK": "x"})]
    assert found == [0, 3, 1, 1, 2, 0]


def test_deepspeeds_extra_word_is_dropped():
    assert own_words(["--local_rank=1", "training.steps=5"]) == ["training.steps=5"]
