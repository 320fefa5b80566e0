"""Speed and memory of the fused kernels, against plain, naive and published code.

`modmask bench`, or `python -m modmask_kernels.bench`.
"""
