"""`python -m dllama_mpi`."""

import sys

from .cli import main

sys.exit(main())
