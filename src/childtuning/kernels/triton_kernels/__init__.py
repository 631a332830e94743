"""What runs on the GPU. These modules import Triton; ``kernels/gpu.py`` imports them with the first call."""
