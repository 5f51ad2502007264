"""A base in memory: loading in 4, 8, 16 or 32 bits, one tensor's quantization, and which kernels run and why.

Only this folder touches bitsandbytes.
"""
