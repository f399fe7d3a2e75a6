"""In the original, the extension module that holds the kernels of FlashAttention 2."""
