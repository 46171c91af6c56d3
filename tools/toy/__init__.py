"""Programs that train and check the toy checkpoints in `persam_dreambooth/toy`."""
