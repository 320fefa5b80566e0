"""`python -m modmask_kernels.bench` is `modmask bench`."""

import sys

from . import main

sys.exit(main())
