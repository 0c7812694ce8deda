"""The evaluation of arXiv 2407.15516 on any model."""
