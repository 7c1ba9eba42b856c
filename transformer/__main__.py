"""``python -m rowmax.transformer``."""

import sys

from ..memory import COMMAND_BLOCKS, keep_freed_memory
from .cli import main

keep_freed_memory(COMMAND_BLOCKS)
sys.exit(main())
