"""Short names of the settings that people turn most: of the flags of `train` and the axes of `sweep`."""

DIALS = {
    "beta": "loss.beta",
    "gamma": "loss.gamma",
    "margin": "loss.margin",
    "mixout": "mixout.p",
    "lr": "train.learning_rate",
    "dropout": "adapter.dropout",
    "epochs": "train.epochs",
    "loss": "loss.preset",
    "link": "loss.link",
    "reduce": "loss.reduce",
    "rank": "adapter.rank",
    "seed": "train.seed",
    "output": "output",
}
"""Name: dotted key of the recipe."""
