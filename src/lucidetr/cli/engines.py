"""The engines that a training run can be handed."""

from lucidetr.models.detr import DETR
from lucidetr.structures import Batch, Predictions
from lucidetr.training.engine import FAST, Engine


def choose_engine(name: str) -> Engine:
    """Return the engine of that name."""
    return reference_engine() if name == "reference" else FAST


def reference_engine() -> Engine:
    """Return the plain reference, reading the fast model's own parameters: gradients land where they belong."""
    from lucidetr.reference import engine

    def forward(model: DETR, batch: Batch) -> Predictions:
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        return engine.predict(state, model.config, batch.images, batch.padding, training=model.training)

    return Engine(forward=forward, loss=engine.loss)
