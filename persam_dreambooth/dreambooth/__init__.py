"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242) with the loss masked to the subject (PerSAM, section 3.4)."""
