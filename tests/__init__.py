"""Tests and benchmarks."""

import study  # noqa: F401  # sets Ray's environment, which must be done before ray is imported
