"""A GPU that is not there: doubles of CUDA's runtime and of TensorRT, stricter than the real ones."""
