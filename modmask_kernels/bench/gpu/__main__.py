"""`python -m modmask_kernels.bench.gpu` is `modmask bench --gpu`."""

import sys

from . import main

sys.exit(main())
