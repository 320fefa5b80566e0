"""`python -m modmask_kernels` is `modmask`."""

import sys

from .cli import main

sys.exit(main())
