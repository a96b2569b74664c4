"""Whether a run is tracked online or offline, by its configuration, the environment, and whether there is a key."""

import netrc
import os
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

from launch.watching.trackers.config import TrackerMode

Mode = Literal["online", "offline", "disabled"]


def modes(mode: TrackerMode, say: Callable[[str], None]) -> list[Mode]:
    """The modes to try, in this order."""
    asked = os.environ.get("WANDB_MODE") if mode == TrackerMode.auto else TrackerMode(mode).value
    if asked == "disabled":
        return ["disabled"]
    if asked == "offline":
        return ["offline"]
    if _has_key():
        return ["online", "offline"]
    if asked == "online":
        say("W&B has no API key (WANDB_API_KEY, or `wandb login`): this run is tracked offline")
    return ["offline"]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return known is not None
