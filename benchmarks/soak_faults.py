"""What is done to a run by a script that draws its moments and victims from a seed."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak_run import Cluster, Run, SlurmRun, SoakFailed

_SAVE_SECONDS = 20.0
"""How long a save is waited for."""
_OWN_SECONDS = 60.0
"""How long the run may need to leave a lost node by itself; then SLURM is told, which would notice in minutes."""
_FOLLOW_SECONDS = 240.0
"""How long SLURM may need then."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    told: str
    """What happens, for the table."""
    weight: int
    """How often it is drawn."""
    strike: Callable[[Run, random.Random], bool]
    """Do it; returns whether there was anything to do it to."""


def kill(numbers: Sequence[int], what: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal to processes; returns whether any was there."""
    struck = False
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, what)
            struck = True
    return struck


def _one(run: Run, dice: random.Random, what: signal.Signals) -> bool:
    ranks = run.ranks()
    return bool(ranks) and kill([ranks[dice.choice(sorted(ranks))]], what)


def _process(run: Run, dice: random.Random) -> bool:
    return _one(run, dice, signal.SIGKILL)


def _asked_process(run: Run, dice: random.Random) -> bool:
    return _one(run, dice, signal.SIGTERM)


def _stopped(run: Run, dice: random.Random) -> bool:
    return _one(run, dice, signal.SIGSTOP)


def _launcher(run: Run, dice: random.Random) -> bool:
    return kill(run.launchers()[:1])


def _supervisor(run: Run, dice: random.Random) -> bool:
    return kill(run.supervisor())


def _asked_supervisor(run: Run, dice: random.Random) -> bool:
    return kill(run.supervisor(), dice.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))


def _everything(run: Run, dice: random.Random) -> bool:
    return kill([*run.supervisor(), *run.launchers(), *run.ranks().values()])


def _in_a_save(run: Run, dice: random.Random) -> bool:
    ranks = run.ranks()
    if not ranks:
        return False
    victim = ranks[dice.choice(sorted(ranks))]
    limit = time.monotonic() + _SAVE_SECONDS
    while not any((run.folder / "checkpoints").glob(".step_*.partial")):
        if time.monotonic() > limit or not Path(f"/proc/{victim}").exists():
            return False
        time.sleep(0.0005)
    time.sleep(dice.random() * 0.01)
    return kill([victim])


def _damage(run: Run, dice: random.Random) -> bool:
    """All processes die, and a file of the newest checkpoint is found cut short, changed or gone."""
    if run.newest() is None or not kill([*run.ranks().values(), *run.launchers()]):
        return False
    time.sleep(0.1)
    newest = run.newest()
    assert newest is not None
    path = dice.choice(sorted(newest.iterdir()))
    data, way = path.read_bytes(), dice.randrange(3)
    if way == 0:
        path.write_bytes(data[: dice.randrange(len(data))])
    elif way == 1:
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.unlink()
    return True


HERE = [
    Fault(name="process", told="a training process is killed", weight=5, strike=_process),
    Fault(name="save", told="a training process is killed while a checkpoint is written", weight=4, strike=_in_a_save),
    Fault(name="damage", told="all are killed, and the newest checkpoint is damaged", weight=2, strike=_damage),
    Fault(name="hang", told="a training process is stopped (SIGSTOP)", weight=2, strike=_stopped),
    Fault(name="notice", told="the supervisor is asked to stop (a signal)", weight=2, strike=_asked_supervisor),
    Fault(name="asked", told="a training process is asked to stop (SIGTERM)", weight=2, strike=_asked_process),
    Fault(name="supervisor", told="the supervisor is killed", weight=2, strike=_supervisor),
    Fault(name="power", told="supervisor, launcher and training are killed at once", weight=1, strike=_everything),
]
LAUNCHER = Fault(name="launcher", told="the launcher is killed", weight=2, strike=_launcher)


def of_cluster(cluster: Cluster) -> list[Fault]:
    """Faults on SLURM."""

    def node(run: Run, dice: random.Random) -> bool:
        assert isinstance(run, SlurmRun)
        nodes = run.nodes()
        if not nodes:
            return False
        lost = dice.choice(nodes)
        cluster.power_off(lost)
        ended = run.wait(lambda: lost not in run.nodes(), seconds=_OWN_SECONDS, pause=0.5)
        if not ended:  # the supervisor was on it, and the job is SLURM's alone
            cluster.notice(lost)
            ended = run.wait(lambda: lost not in run.nodes(), seconds=_FOLLOW_SECONDS, pause=0.5)
        cluster.power_on(lost)
        if not ended:
            raise SoakFailed(f"the job stays on node {lost}, which is lost: {run.said()}")
        return True

    def notice(run: Run, dice: random.Random) -> bool:
        assert isinstance(run, SlurmRun)
        if run.state() != "RUNNING":
            return False
        cluster.ask("scancel", "--signal=USR1", "--batch", run.number)
        return True

    kept = [one for one in HERE if one.name in ("process", "save", "damage", "hang")]
    return [
        *kept,
        Fault(name="node", told="a node is lost", weight=4, strike=node),
        Fault(name="notice", told="SLURM asks for a checkpoint (SIGUSR1)", weight=2, strike=notice),
    ]


class Plan:
    """The faults to come, from a seed."""

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults, self.dice = faults, random.Random(seed)

    def next(self) -> tuple[Fault, int | None, float]:
        """The next fault: after so many more steps, or at any time (None) after so many more seconds."""
        (fault,) = self.dice.choices(self._faults, [one.weight for one in self._faults])
        early = self.dice.random() < 0.15 and fault.name not in ("save", "damage")
        return fault, None if early else self.dice.randrange(1, 25), self.dice.random() * (12 if early else 0.3)
