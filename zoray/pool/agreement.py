"""Which replicas to doubt: those whose state, or whose score of a tile that all have scored, differs from the others'.

A state's digest is exact, so one that differs is wrong. A score may differ by what rounding and packing do to it on the
same weights; a larger difference comes from a damaged model, kernel or device.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import TYPE_CHECKING

from zoray.records import JournalError

if TYPE_CHECKING:
    from collections.abc import Mapping

TOLERANCE = 12.0  # standard deviations of an example's loss, see Replica.score_noise
LEAST = 1e-5  # nats


def differing_digests(digests: Mapping[str, str]) -> set[str]:
    """Names whose digest differs from the majority's; both where two differ, since either may be wrong.

    Raises:
        JournalError: there are three or more, and no digest is shared by more than half of them.
    """
    if not digests:
        return set()
    common, count = Counter(digests.values()).most_common(1)[0]
    if 2 * count > len(digests):
        return {name for name, digest in digests.items() if digest != common}
    if len(digests) == 2:
        return set(digests)
    raise JournalError(
        f"most replicas disagree about the state: {_listed(digests)}. More than one replica is affected: software or "
        "devices differ between them, or memory is failing. The journal is sound: `python -m zoray.replay` rebuilds "
        "the state and gives the right digest; remove the replicas with another digest, and resume the run"
    )


def differing_scores(scores: Mapping[str, float], noise: float) -> set[str]:
    """Names whose score of the same tile at the same state differs from the majority's.

    `noise`: standard deviation of an example's loss on the same weights. Scores that are not finite agree with one
    another: where most are, the state itself is to blame. Of two that differ, the one that is not finite; else both.

    Raises:
        JournalError: there are three or more, and no score is shared by more than half of them.
    """
    if len(scores) < 2:
        return set()
    lost = {name for name, score in scores.items() if not math.isfinite(score)}
    sound = scores.keys() - lost
    if 2 * len(lost) > len(scores):
        return set(sound)
    within = max(LEAST, TOLERANCE * noise)
    middle = statistics.median_low(sorted(scores[name] for name in sound)) if sound else math.nan
    differing = lost | {name for name in sound if abs(scores[name] - middle) > within} if sound else set()
    if 2 * len(differing) < len(scores):
        return differing
    if len(scores) == 2:
        return lost or set(scores)
    raise JournalError(
        f"most replicas disagree about the loss of the same examples at the same state: {_listed(scores)} (expected "
        f"them within {within:.1e}). More than one replica is affected: compare the nodes' devices and drivers; the "
        "journal is sound, and the run can be resumed"
    )


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
