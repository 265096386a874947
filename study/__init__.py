"""Running a study: data, models, features, training, search, confirmation, export."""

import os
import time

#: Process start, Unix seconds; import this package before anything slow.
STARTED = time.time()

# Ray reads these when it is imported, which any module of this package may do first.
# Under `uv run`, Ray would pack the working directory and build an environment per worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray Tune would take Ctrl-C as "end the search early", and the study would go on without it.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Ray would say at length what the study says in a line: that it has lost a worker.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|killed due to|low on memory"
)
