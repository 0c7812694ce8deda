"""What makes up for what is skipped: refits of kept weights in closed form, published
methods, and training.
"""
