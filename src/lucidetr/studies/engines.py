"""The engines that a training run can be handed."""

from dataclasses import replace

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch, Hints, Predictions
from lucidetr.training.engine import FAST, Engine


def choose_engine(config: TrainConfig) -> tuple[TrainConfig, Engine]:
    """Return the engine that the config names, and the config fit for it; what it cannot do is an InputError."""
    if config.engine == "fast":
        return config, FAST
    if config.precision == "bf16":
        raise InputError("--engine reference computes in fp32 or fp64: leave --precision bf16 out")
    for option in ("compile", "recompute"):
        if getattr(config, option):
            raise InputError(f"--engine reference reads the model's own parameters: leave --{option} out")
    if frozen := moving_parts(config):
        raise InputError(
            f"--engine reference has one state for the whole model, learning or not, and {frozen} would move though it "
            "is frozen: leave --freeze out, or --model.dropout 0 and frozen or group norms in"
        )
    backbone = config.model.backbone.name
    if backbone != "convnet" and not backbone.startswith("resnet"):
        raise InputError(f"--engine reference knows ResNets and the convnet, not {backbone}: choose another backbone")
    precision = "fp32" if config.precision == "auto" else config.precision
    return replace(config, precision=precision), reference_engine()


def moving_parts(config: TrainConfig) -> str:
    """Return what is frozen and would still change or be dropped while the rest learns, in words; "" for nothing."""
    if config.model.backbone.norm == "batch" and any(name.startswith(("backbone", "fusion")) for name in config.freeze):
        return "batch norm"
    if config.model.dropout and not all(name.startswith("backbone") for name in config.freeze):
        return "dropout"
    return ""


def reference_engine() -> Engine:
    """Return the plain reference, reading the fast model's own parameters: gradients land where they belong."""
    from lucidetr.reference import engine

    def forward(model: DETR, batch: Batch, hints: Hints | None) -> Predictions:
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        return engine.predict(state, model.config, batch.images, batch.padding, training=model.training, hints=hints)

    return Engine(forward=forward, loss=engine.loss)


def listening(engine: Engine, losses: list[float]) -> Engine:
    """Return an engine that notes the loss of every part of every batch as well."""

    def loss(*arguments: object) -> object:
        made = engine.loss(*arguments)  # type: ignore[arg-type]
        losses.append(float(made.total.detach()))
        return made

    return Engine(forward=engine.forward, loss=loss)
