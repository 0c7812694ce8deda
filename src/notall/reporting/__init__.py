"""What people look at: tables at the terminal, figures, and a results folder as one page."""
