"""SLURM's compact lists of hosts, such as `gpu[01-03,7],login`, written out."""

import re

from relora.errors import ConfigError

_ITEM = re.compile(r"((?:[^,\[\]]|\[[^\[\]]*\])+)(?:,|$)")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


def expand(compact: str) -> list[str]:
    """All hosts of a list, in its order; an empty list has none.

    Raises:
        ConfigError: the text is no such list.
    """
    hosts: list[str] = []
    place = 0
    while place < len(compact):
        item = _ITEM.match(compact, place)
        if item is None:
            raise ConfigError(f"{compact!r} is no list of hosts as SLURM writes them: set MASTER_ADDR and MASTER_PORT")
        hosts += _expand_item(item[1])
        place = item.end()
    return hosts


def _expand_item(item: str) -> list[str]:
    brackets = _BRACKETS.search(item)
    if brackets is None:
        return [item]
    before, after = item[: brackets.start()], _expand_item(item[brackets.end() :] or "")
    return [before + number + rest for number in _expand_numbers(brackets[1]) for rest in after]


def _expand_numbers(ranges: str) -> list[str]:
    """`08-10,12` is 08, 09, 10, 12: the width of the first number is kept."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise ConfigError(f"{part!r} is no range of hosts as SLURM writes them: set MASTER_ADDR and MASTER_PORT")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
