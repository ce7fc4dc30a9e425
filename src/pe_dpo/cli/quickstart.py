"""`pe-dpo quickstart`."""

import shlex
import time

from pe_dpo.cli import console, options


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
    console.start()
    import torch

    from pe_dpo.training.train import train

    # Matrices this small gain nothing from a second thread; on a busy machine one was several times faster (research log).
    torch.set_num_threads(1)
    result = train(recipe, callbacks=[console.progress_callback()])
    console.show_result(result)
    for question, expected, base, tuned in compare_answers(recipe, count=3) if result.after else []:
        console.say(f"\nquestion  {question}\nchosen    {expected}\nbase      {base}\ntuned     {tuned}")
    console.say(f"\nthe run lies in {result.folder} ({time.perf_counter() - started:.0f} s)")
    again = "pe-dpo quickstart --gamma 0 --margin 1"
    console.say(f"next: pe-dpo merge {shlex.quote(str(result.folder))} -o MODEL, or another loss: {again}")
    console.say(f"how it is loaded and served: pe-dpo serve {shlex.quote(str(result.folder))}")
