"""`doctor`: what this machine has, what will not work and why; under a launcher also how fast processes exchange."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import exits
from launch.environment import git_commit
from launch.examination import Examination, Finding, examine
from parallel.bandwidth import Reading, measure
from parallel.collectives import broadcast_object, gather_objects
from parallel.files import write_atomically
from parallel.launchers import announced, own_words
from parallel.runtime import start
from parallel.watchdog import watched

_ALIKE = ("python", "packages", "code")
"""Facts that must be the same on all processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `doctor`; returns 0 when training can run, 1 when something that it needs is broken."""
    parser = argparse.ArgumentParser(prog="accrete doctor", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file as well")
    words = parser.parse_args(own_words(sys.argv[1:] if argv is None else argv))
    return exits.run(lambda: run_command(words.dir, words.json))


def run_command(folder: Path, output: Path | None) -> int:
    """Examine, print, and write the file if one is wanted.

    Raises:
        ConfigError: the processes do not come together.
    """
    launcher = announced(os.environ).launcher
    with start() as runtime, watched(runtime, explain=exits.explain):
        own = examine(folder)
        own.facts["code"] = git_commit() or "installed"
        everyone = gather_objects(runtime, own)
        hosts = [one.facts["machine"].split(",")[0] for one in everyone]
        readings = measure(runtime, hosts) if runtime.world_size > 1 else []
        findings = _of_all(everyone, hosts)
        code = exits.FAILED if any(finding.broken for finding in findings) else exits.DONE
        if runtime.is_main:
            processes = f"{runtime.world_size} by {launcher}, over {'gloo' if runtime.device.type == 'cpu' else 'nccl'}"
            own.facts["processes"] = f"{processes}: " + ", ".join(
                f"{n} on {host}" for host, n in Counter(hosts).items()
            )
            _print(own.facts, findings, readings)
            if output is not None:
                write_atomically(output, json.dumps(_record(own.facts, findings, readings), indent=1) + "\n")
        return broadcast_object(runtime, code)


def _of_all(everyone: list[Examination], hosts: list[str]) -> list[Finding]:
    """The main process's findings, what others found besides, and what they have otherwise than it."""
    findings = list(everyone[0].findings)
    seen = {(hosts[0], finding.what) for finding in findings}
    for one, host in zip(everyone, hosts, strict=True):
        for finding in one.findings:
            if (host, finding.what) not in seen:
                seen.add((host, finding.what))
                findings.append(
                    Finding(what=f"on {host}: {finding.what}", way_out=finding.way_out, broken=finding.broken)
                )
    return findings + _differences([one.facts for one in everyone], hosts)


def _differences(facts: list[dict[str, str]], hosts: list[str]) -> list[Finding]:
    return [
        Finding(
            what=f"process {rank} on {hosts[rank]} has {name} {theirs[name]}, but process 0 has {facts[0][name]}",
            way_out="start all processes from one environment and one checkout (on a shared file system)",
            broken=True,
        )
        for name in _ALIKE
        for rank, theirs in enumerate(facts)
        if theirs[name] != facts[0][name]
    ]


def _print(facts: dict[str, str], findings: list[Finding], readings: list[Reading]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    if readings:
        print(f"\n{'all-reduce':<24}{'size':>10}{'time':>12}{'each link':>14}")
    for reading in readings:
        speed = f"{reading.bytes_per_second / 1e9:.3f} GB/s"
        size, time = f"{reading.bytes >> 10} KiB", f"{reading.seconds * 1e3:.3f} ms"
        print(f"{reading.between:<24}{size:>10}{time:>12}{speed:>14}")
    print()
    for finding in sorted(findings, key=lambda finding: not finding.broken):
        print(f"{'BROKEN' if finding.broken else 'note'}: {finding.what}\n    {finding.way_out}")
    broken = sum(finding.broken for finding in findings)
    print(f"{broken} broken: training cannot run here" if broken else "training can run here")


def _record(facts: dict[str, str], findings: list[Finding], readings: list[Reading]) -> dict[str, Any]:
    return {
        "facts": facts,
        "findings": [asdict(finding) for finding in findings],
        "bandwidth": [asdict(reading) for reading in readings],
    }


if __name__ == "__main__":
    sys.exit(main())
