"""`pe-dpo quickstart`."""

import shlex
import time
from collections.abc import Mapping

from pe_dpo.cli import console, options

BOTH_FELL = "both answers became less likely"
NO_SETTINGS = ("output", "train.seed")
"""What may be given to quickstart and leaves it the run that is explained."""


def explain_fall(after: Mapping[str, float]) -> str:
    """Return in words what the alarm means with which most runs with DPO end, in the numbers of this one.

    Args:
        after: metrics of the held-out pairs at the end, see `pair_metrics`.
    """
    fall, per_token = -after["displacement/chosen"], -after["displacement/chosen_per_token"]
    return (
        "The warning above is what most runs with DPO end with, and no failure of this one: the loss asks only that the "
        "distance between chosen and rejected grows, and pushing the rejected answers down does most of it. What counts is how "
        f"far the chosen ones fell: here by {fall:.1f} nats in {fall / per_token:.0f} tokens, {per_token:.2f} a token. A "
        "little of their own likelihood in the loss holds them: pe-dpo quickstart --set loss.sft_weight=0.1"
    )


def quickstart(
    loss: options.Loss = None,
    beta: options.Beta = None,
    gamma: options.Gamma = None,
    margin: options.Margin = None,
    link: options.Link = None,
    mixout: options.Mixout = None,
    lr: options.LearningRate = None,
    epochs: options.Epochs = None,
    seed: options.Seed = None,
    output: options.Output = None,
    set_: options.Settings = None,
) -> None:
    """Train, evaluate and explain a run on an embedded model and data: offline, about a minute on a CPU."""
    from pe_dpo.quickstart.demo import compare_answers, quickstart_recipe

    started = time.perf_counter()
    turned = options.overrides(
        set_, loss=loss, beta=beta, gamma=gamma, margin=margin, link=link, mixout=mixout, lr=lr,
        epochs=epochs, seed=seed, output=output,
    )  # fmt: skip
    recipe = quickstart_recipe(turned)
    terminal = console.start()
    console.show_lines([
        "a model of 1.4 M parameters, which is in this package, learns to answer politely from 1,000 pairs: about a minute on "
        "a CPU, nothing is downloaded"
    ])  # fmt: skip
    import torch

    from pe_dpo.cli.held_out import show_result
    from pe_dpo.cli.live import progress_callback
    from pe_dpo.training.train import train

    # Matrices this small gain nothing from a second thread; on a busy machine one was several times faster (research log).
    torch.set_num_threads(1)
    result = train(recipe, callbacks=[progress_callback(terminal.live)])
    show_result(result)
    for question, expected, base, tuned in compare_answers(recipe, count=3) if result.after else []:
        console.say()
        console.show_grid([["question", question], ["chosen", expected], ["base", base], ["tuned", tuned]])
    quoted = shlex.quote(str(result.folder))
    console.say()
    is_default = all(setting.partition("=")[0] in NO_SETTINGS for setting in turned)
    if is_default and any(BOTH_FELL in remark for remark in result.remarks):
        console.show_lines([f"{explain_fall(result.after)}\n"])
    console.say(f"the run lies in {result.folder} ({time.perf_counter() - started:.0f} s); next:")
    for command, words in (
        (f"pe-dpo report {quoted}", "all of this with plots, on a page"),
        (f"pe-dpo merge {quoted} -o MODEL", "one model, with a proof"),
        ("pe-dpo quickstart --gamma 0 --margin 1", "another loss"),
        (f"pe-dpo serve {quoted}", "how it is loaded and served"),
    ):
        console.say(f"  {command:<38}  # {words}")
