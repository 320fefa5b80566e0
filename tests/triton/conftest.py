"""Triton chooses between compiling and interpreting when it is imported, so the interpreted tests
run in a process of their own, started by test_interpreter.py."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
