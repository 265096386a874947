"""Running a study: data, models, features, training, search, confirmation, export."""

import os
import time

#: Process start, Unix seconds; import this package before anything slow.
STARTED = time.time()

# Ray reads these at import, and any module of this package may import it first.
# Under `uv run`, Ray would package the working directory and build an environment per worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray Tune would treat Ctrl-C as "end the search early", and the study would continue.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# The study reports a lost worker in one line; suppress Ray's longer messages.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|killed due to|low on memory"
)
