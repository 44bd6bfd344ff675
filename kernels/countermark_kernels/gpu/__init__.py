"""The ops as Triton kernels, imported only where a tensor is on CUDA (or by tests): the same bits as the references."""
