"""When the command began: whoever imports this before anything slow knows the moment."""

import time

BEGAN = time.time()
