"""The paper's whole evaluation of a model: its Fig. 1, its tables, and its claims beside what the model shows."""

from .running import SIMILARITY, Evaluation, Timing, run_paper

__all__ = ["SIMILARITY", "Evaluation", "Timing", "run_paper"]
