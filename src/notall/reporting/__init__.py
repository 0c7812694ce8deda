"""What people look at: tables at the terminal, figures, and a results folder as one page.

Nothing is imported here: the terminal's tables need no extra, figures and the page do.
"""
