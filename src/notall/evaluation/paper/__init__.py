"""The paper's sweep on a text, its tables and claims.

Nothing is imported here: the sweep needs no extra, the rest lm-evaluation-harness.
"""
