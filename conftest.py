"""Settings of every test run."""

import torch
from hypothesis import settings

# Small tensors gain nothing from threads, and two test processes with two threads each would fight for two cores.
torch.set_num_threads(1)

# The same examples in every run, so that a red test is red for everyone; no deadline on shared machines.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")
