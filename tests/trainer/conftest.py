"""Makes the programs beside the tests importable, which tests start and compare with."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
