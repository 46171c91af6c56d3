"""`persam-dreambooth`, which also says what share of a sharded model a process holds, and what it gathers and frees."""

import sys

from torch.distributed import get_rank
from torch.distributed.tensor import DTensor

from persam_dreambooth import cli
from persam_dreambooth.dreambooth import sharding
from persam_dreambooth.dreambooth.families import latent_diffusion

shard, whole, gather = latent_diffusion.shard, sharding.whole, latent_diffusion.LatentDiffusion.gather


def watched(model, device):
    shard(model, device)
    held = [
        weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel() for weight in model.parameters()
    ]
    print(f"share held: {sum(held) / sum(weight.numel() for weight in model.parameters()):.2f}")


def gathering(state):
    found = whole(state)
    print(f"rank {get_rank()} keeps {'nothing' if found is None else 'all'}")
    return found


def gathering_weights(family):
    print(f"still kept: {len(family.gathered)}")
    gather(family)


latent_diffusion.shard = watched
latent_diffusion.LatentDiffusion.gather = gathering_weights
latent_diffusion.whole = sharding.whole = gathering
raise SystemExit(cli.main(sys.argv[1:]))
