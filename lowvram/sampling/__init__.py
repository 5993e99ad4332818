"""Noise levels, solver steps and guidance: pure functions over latents. No files but the preset data, no devices."""
