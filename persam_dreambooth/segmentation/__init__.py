"""One-shot personalized segmentation with SAM: PerSAM and PerSAM-F (Zhang et al. 2023, arXiv 2305.03048)."""

from persam_dreambooth.segmentation.persam import Found, PerSAM, PerSAMF, Step, find_instances
from persam_dreambooth.segmentation.sams.checkpoints import open_sam
from persam_dreambooth.segmentation.sams.sam import Encoding, Sam

__all__ = ["Encoding", "Found", "PerSAM", "PerSAMF", "Sam", "Step", "find_instances", "open_sam"]
