"""The jobs, one verb a file."""

import os

STARTED_BY = os.getppid()
"""The process that started this job. Noted before the imports, which take seconds: it may be gone
after them, and an orphan's parent is another process."""
