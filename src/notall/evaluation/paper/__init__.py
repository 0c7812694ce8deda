"""The paper's whole evaluation of a model: its Fig. 1, its tables, and its claims beside what the model shows."""
