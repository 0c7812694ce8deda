"""What to skip: by every published criterion and by a lazy search, for an objective,
under a budget.
"""
