"""Whether it worked: held-out figures, answers side by side, benchmarks, comparisons, memorisation."""
