"""Seeds of random streams."""

import numpy as np


def derived_seed(*key: int) -> int:
    """A seed for a key such as (run's seed, stream, sample number); different keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
