"""What plans cost on benchmarks and in what accuracy hides: lm-evaluation-harness for
many plans in one pass.
"""
