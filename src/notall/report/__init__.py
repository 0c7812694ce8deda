"""A results folder as one page that opens anywhere."""
