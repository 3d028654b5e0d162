"""What every test runs under."""

import torch

# small tensors: a second thread costs more than it gives, and much more on a busy machine
torch.set_num_threads(1)
