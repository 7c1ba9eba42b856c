"""`python -m rowmax.bench`; see cli.py."""

from __future__ import annotations

import sys
from pathlib import Path

from .cli import main

if __name__ == "__main__":
    # `-m` puts the working directory on the path. If that is the checkout, its `kernels/` would
    # pass for Hugging Face's package of that name, which transformers looks for.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [at for at in sys.path if Path(at).resolve() != root]
    sys.exit(main())
