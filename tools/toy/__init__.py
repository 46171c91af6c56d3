"""The programs that trained and that check the toy checkpoints that ship in `persam_dreambooth/toy`."""
