"""Tests that run kernels in Triton's interpreter, which replaces its compiler process-wide: see test_triton_interpreted.py."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
