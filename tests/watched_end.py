"""`persam-dreambooth`, which also says how many wrappers of models for several processes are left when it ends them."""

import gc
import sys

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from persam_dreambooth import cli

end_training = Accelerator.end_training


def watched(accelerator):
    print("wrappers left:", sum(isinstance(each, DistributedDataParallel) for each in gc.get_objects()))
    end_training(accelerator)


Accelerator.end_training = watched
raise SystemExit(cli.main(sys.argv[1:]))
