"""The audit of a request to forget: scores on what was to be forgotten and on what was to be kept, before and after.

Scores are by the names of the request's held-out sets: `forgotten`, `retained`, and `earlier` ones for what other
requests asked for before. Pure arithmetic. Source of the names: GS-LoRA (arXiv 2403.11530); docs/gs_lora.md.
"""

from collections.abc import Mapping
from statistics import fmean

from continual.metrics import h_mean


def audit(before: Mapping[str, float], after: Mapping[str, float], *, accuracy: bool) -> dict[str, float]:
    """What a request forgot and kept: of classifiers by accuracy, of language models by nats per target."""
    earlier = [score for name, score in after.items() if name.split()[0] == "earlier"]
    if accuracy:
        drop = before["forgotten"] - after["forgotten"]
        told = {
            "forgotten_before": before["forgotten"],
            "forgotten_after": after["forgotten"],
            "retained_before": before["retained"],
            "retained_after": after["retained"],
        }
        told |= {"earlier_after": fmean(earlier)} if earlier else {}
        return told | {"drop": drop, "h_mean": h_mean(drop, after["retained"])}
    told = {
        "forgotten_loss_before": before["forgotten"],
        "forgotten_loss_after": after["forgotten"],
        "retained_loss_before": before["retained"],
        "retained_loss_after": after["retained"],
    }
    told |= {"earlier_loss_after": fmean(earlier)} if earlier else {}
    return told | {
        "forgotten_rise": after["forgotten"] - before["forgotten"],
        "retained_rise": after["retained"] - before["retained"],
    }
