"""Weights of what is kept are refit, in closed form, to make up for what is skipped."""
