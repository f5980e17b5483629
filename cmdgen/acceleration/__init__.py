"""Less work and less memory: Streamlined Inference (Zhan et al. 2024, arXiv:2411.01171)."""
