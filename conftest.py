"""Puts the repository root on sys.path: the modules under test lie there, not in a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
