"""`python -m kaggle_mgpu.env` prints the report of `env.fix()`."""

import sys

from .environment import main

sys.exit(main())
