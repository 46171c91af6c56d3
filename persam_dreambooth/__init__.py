"""From one mask to a personalized Stable Diffusion: PerSAM masks, masked DreamBooth training."""

__version__ = "0.1.0"
