"""Noise schedules, samplers and guidance: pure functions over a denoiser."""
