"""The feed-forward network, applied to each token by itself (DETR, A.3)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.layers.dropout import Dropout


class TwoLayers(nn.Module):
    """Apply two linear layers with a ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Float[Tensor, "*any inputs"]) -> Float[Tensor, "*any outputs"]:
        """Return output(relu(hidden(x)))."""
        return self.output(F.relu(self.hidden(x)))


class FeedForward(nn.Module):
    """Widen each token to `hidden` channels, apply a ReLU, narrow again."""

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__()
        self.expand = nn.Linear(d_model, hidden)
        self.contract = nn.Linear(hidden, d_model)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.contract.weight)

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
        """Return contract(relu(expand(x)))."""
        return self.contract(self.dropout(F.relu(self.expand(x))))
