"""The Gluon form of the GEMM for sm_90, part by part; kernel.py puts it together."""
