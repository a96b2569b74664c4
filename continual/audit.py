"""The audit of a request to forget: scores on what was to be forgotten and on what was to be kept, before and after.

Scores are by the names of the request's held-out sets: `forgotten`, `retained`, and `earlier` ones for what other
requests asked for before. Pure arithmetic. Source of the names: GS-LoRA (arXiv 2403.11530); docs/gs_lora.md.
"""

from collections.abc import Mapping
from statistics import fmean

from continual.metrics import h_mean


def audit(before: Mapping[str, float], after: Mapping[str, float], *, accuracy: bool) -> dict[str, float]:
    """What a request forgot and kept: of classifiers by accuracy, of language models by nats per target."""
    kind = "" if accuracy else "loss_"
    told = {
        f"{name}_{kind}{when}": scores[name]
        for name in ("forgotten", "retained")
        for when, scores in (("before", before), ("after", after))
    }
    earlier = [score for name, score in after.items() if name.split()[0] == "earlier"]
    if earlier:
        told[f"earlier_{kind}after"] = fmean(earlier)
    if accuracy:
        drop = before["forgotten"] - after["forgotten"]
        return told | {"drop": drop, "h_mean": h_mean(drop, after["retained"])}
    return told | {f"{name}_rise": after[name] - before[name] for name in ("forgotten", "retained")}
