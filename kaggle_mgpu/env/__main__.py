"""`python -m kaggle_mgpu.env` prints the report of `env.fix()`; see `main` in environment.py."""

import sys

from .environment import main

sys.exit(main())
