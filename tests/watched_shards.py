"""`persam-dreambooth`, which also says what share of each model that is sharded a process holds."""

import sys

from torch.distributed.tensor import DTensor

from persam_dreambooth import cli
from persam_dreambooth.dreambooth.families import latent_diffusion

shard = latent_diffusion.shard


def watched(model, device):
    shard(model, device)
    held = [
        weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel() for weight in model.parameters()
    ]
    print(f"share held: {sum(held) / sum(weight.numel() for weight in model.parameters()):.2f}")


latent_diffusion.shard = watched
raise SystemExit(cli.main(sys.argv[1:]))
