"""``python -m curvprune``, for ``torchrun -m curvprune``."""

from curvprune.cli import app

app()
