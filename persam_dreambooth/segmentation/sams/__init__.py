"""The SAM models, one in each file; `checkpoints.open_sam` opens them."""
