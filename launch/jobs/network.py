"""The environment variables of NCCL, Gloo and torchrun that job scripts set, in one place, each with its reason."""

from typing import NamedTuple

# torch 2.13 offers workers the agent's own store; after a start anew on several machines its addresses are stale.
RESTARTABLE = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

NO_PREFLIGHT = ("ACCRETE_PREFLIGHT", "0")
"""As launch/training/preflight.py reads it."""


class Setting(NamedTuple):
    """A variable of the training processes."""

    name: str
    value: str
    reason: str


def network_settings(
    *, interface: str | None, infiniband: str | None, gpus: bool, torchrun: bool, grace_seconds: int
) -> list[Setting]:
    """What processes on several machines need to be told."""
    found = []
    if interface is not None:
        reason = "else Gloo takes the device of the host's name, which may be slow"
        found.append(Setting("GLOO_SOCKET_IFNAME", interface, reason))
    if gpus:
        if interface is not None:
            found.append(Setting("NCCL_SOCKET_IFNAME", interface, "NCCL may take a bridge of containers, and hang"))
        if infiniband is not None:
            found.append(Setting("NCCL_IB_HCA", infiniband, "else NCCL takes every adapter, those of storage, too"))
        found.append(Setting("NCCL_DEBUG", "WARN", "NCCL says why it fails"))
    if torchrun:
        found.append(Setting(*RESTARTABLE, "else torchrun's restarts over several nodes meet at stale addresses"))
        reason = "torchrun, told to stop, ends processes after so many seconds: enough for a checkpoint"
        found.append(Setting("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace_seconds), reason))
    return found
