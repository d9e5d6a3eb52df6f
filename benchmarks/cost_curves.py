"""How the cost of a step grows with the batch, the length, the number of classes and the number of passes.

One small GPT-2, of which one size at a time is varied. R-Drop of m passes stands beside plain training on m times the
rows, both in parts of a plain step; they take turns as in `step_time.py`.

    python cost_curves.py --out results/cost_curves_tensorflow.json
    KERAS_BACKEND=jax python cost_curves.py --out results/cost_curves_jax.json
    python cost_curves.py --picture docs/cost-curves.png results/cost_curves_*.json
"""

import argparse
import functools
import pathlib
import statistics

import measure

SIZES = {
    "rows": (8, 32, 128, 512),
    "length": (32, 128, 512),
    "classes": (10, 1000, 16_000, 64_000),
    "passes": (2, 4, 8),
}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
TITLES = {"rows": "rows of a batch", "length": "tokens of a row", "classes": "classes", "passes": "passes, m"}
USUAL = {"rows": 8, "length": 32, "classes": 1000, "passes": 2}


def measured(rounds):
    """`{size: {value: {"plain, mN rows": ratio to plain, "RDropModel": the same}}}`."""
    return {
        size: {value: of_sizes(rounds, *(USUAL | {size: value}).values()) for value in values}
        for size, values in SIZES.items()
    }


@functools.cache
def of_sizes(rounds, rows, length, classes, passes):
    import keras

    import rdrop_keras
    import step_time
    import two_calls

    def fitted(wrap=lambda model: model, times=1):
        keras.utils.set_random_seed(0)
        model, data, _ = step_time.lm(num_layers=2, num_heads=2, width=128, length=length, vocabulary=classes)
        model = wrap(step_time.plain(model))
        model.compile(keras.optimizers.SGD(two_calls.LEARNING_RATE), step_time.CROSSENTROPY)
        return step_time.in_fit(model, *data(times * rows))

    def rdrop(model):
        return rdrop_keras.RDropModel(model, alpha=two_calls.ALPHA, num_passes=passes)

    functions = {
        "plain": fitted,
        "plain, mN rows": functools.partial(fitted, times=passes),
        "RDropModel": functools.partial(fitted, rdrop),
    }
    rows_of = step_time.time_variants(functions, rounds)
    result = {name: statistics.median(step_time.ratios(rows_of, name, "plain")) for name in list(functions)[1:]}
    print(f"{rows:5} rows {length:5} tokens {classes:7,} classes {passes:3} passes", end="")
    print("".join(f"  {name} {ratio:.2f}" for name, ratio in result.items()), flush=True)
    keras.utils.clear_session()
    return result


def draw(path, results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(SIZES))
    for panel, size in zip(panels, SIZES):
        for i, result in enumerate(results):
            curve = result["sizes"][size]
            values = list(map(int, curve))
            for name, style in (("plain, mN rows", "--"), ("RDropModel", "-")):
                label = f"{BACKENDS[result['backend']]}: {name}"
                ratios = [ratio[name] for ratio in curve.values()]
                panel.plot(values, ratios, style, color=f"C{i}", marker=".", label=label)
        ticks = [str(n) if n < 1000 else f"{n // 1000}k" for n in SIZES[size]]
        panel.set(xlabel=TITLES[size], xscale="log", xticks=SIZES[size], xticklabels=ticks)
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("× the time of a plain step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write the results to")
    parser.add_argument("--picture", type=pathlib.Path, help="draw the results that are given, to this file")
    parser.add_argument("results", nargs="*", type=pathlib.Path)
    args = parser.parse_args()
    if bool(args.picture) != bool(args.results):
        parser.error("--picture FILE needs the JSON files of the results to draw, and these --picture FILE")
    if args.picture:
        draw(args.picture, [measure.read(path, None) for path in args.results])
        return
    import keras

    sizes = measured(args.rounds)
    result = {**measure.provenance(), "backend": keras.backend.backend(), "rounds": args.rounds, "sizes": sizes}
    if args.out:
        measure.write(args.out, result)


if __name__ == "__main__":
    main()
