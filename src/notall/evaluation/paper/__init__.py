"""The paper's whole evaluation of a model: its Fig. 1, its tables, and its claims beside what the model shows."""

from .running import Evaluation, TimeGrid, run_paper

__all__ = ["Evaluation", "TimeGrid", "run_paper"]
