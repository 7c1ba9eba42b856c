"""Settings for all tests; loaded before anything imports torch."""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait, and so starve the other test process (or whatever else the
# machine does). The runtime reads this when it is loaded, so it must be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
