"""GenEval: objects, counts, colours and positions, by a detector and CLIP."""

from flowopd.rewards.geneval.reward import GenEval
from flowopd.rewards.geneval.verdicts import Clause, Detection, Scene, correct, partial, relations, select, strict

__all__ = ["Clause", "Detection", "GenEval", "Scene", "correct", "partial", "relations", "select", "strict"]
