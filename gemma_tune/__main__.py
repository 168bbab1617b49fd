"""`python -m gemma_tune`, which is also what `accelerate launch -m gemma_tune` starts."""

from gemma_tune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
