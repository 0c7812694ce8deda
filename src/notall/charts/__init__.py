"""Figures, as Vega-Lite: drawn from facts, dressed and saved as files, or left bare for
a page, which has themes.
"""
