"""Commands by tags: what somebody adds to a running run in W&B, from a telephone perhaps, is asked of the run.

Looks now and then, in a thread of its own. A tag is taken away before it is obeyed, so that it is obeyed once. What
fails on the way to the server is told once, and tried again at the next look.
"""

from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Any

from launch.watching.trackers.tracker import Guard

EVERY_SECONDS = 30.0
"""Between two looks: servers limit the requests of a user, who may have many runs."""


class TagCommands:
    """Looks for the tags of one run."""

    def __init__(
        self,
        find: Callable[[], Any],
        commands: Sequence[str],
        ask: Callable[[str], None],
        say: Callable[[str], None],
        *,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """`find` gives the run as the server has it now: `tags`, and `update` to send what was set."""
        self._find, self._commands, self._ask, self._say = find, frozenset(commands), ask, say
        self._every_seconds = every_seconds
        self._guard = Guard(say, "W&B's tags cannot be read or changed, which is tried again", "wandb")
        self._ended = Event()

    def start(self) -> None:
        """Begin to look."""
        Thread(target=self._work, name="tags", daemon=True).start()

    def stop(self) -> None:
        """Look no more; a look that is going on is not waited for."""
        self._ended.set()

    def look(self) -> None:
        """Take away the tags that are commands, and ask for what they say."""
        with self._guard:
            run = self._find()
            tags = list(run.tags)
            asked = [tag for tag in tags if tag in self._commands]
            if not asked:
                return
            run.tags = [tag for tag in tags if tag not in self._commands]
            run.update()
            for tag in asked:
                self._say(f"tag in W&B: {tag}")
                self._ask(tag)

    def _work(self) -> None:
        while not self._ended.wait(self._every_seconds):
            self.look()
