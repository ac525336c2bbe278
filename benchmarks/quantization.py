"""Sparse and int8 side by side: accuracy, bytes and latency of one net, on the digits of scikit-learn.

    python -m benchmarks.quantization [--seeds N] [--epochs N] [--width N] [--out benchmarks/results]

Prints a table in Markdown, and writes it to quantization.md, with the numbers of each seed in quantization.json.
Accuracy is that of the ONNX file in onnxruntime, mean and standard deviation over the seeds, which also divide the
data. Latency is of 64 pictures on one thread, the median of rounds in which all files take turns, as a ratio to the
dense file; the smaller, the faster. It is the time of the thread on the CPU, so that other processes do not matter.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from fastai.layers import ConvLayer
from fastai.learner import Learner
from torch import nn

from benchmarks.accuracy.pictures import digits
from benchmarks.timing import interleaved, surroundings
from sparsifai.all import QuantizeCallback, SparsifyCallback, quantize, save_sparse
from sparsifai.quantization.exported import export_float
from sparsifai.support.files import write_text

SPARSITY, FILTERS = 0.9, 0.5

# Name of a row -> the callbacks of its fit, and whether the file is int8.
CASES = {
    "dense": ([], False),
    "int8": ([], True),
    "int8, trained for it": (["int8"], True),
    "sparse": (["weights"], False),
    "sparse, then int8": (["weights"], True),
    "sparse and int8, trained for both": (["weights", "int8"], True),
    "shrunk": (["filters"], False),
    "shrunk, then int8": (["filters"], True),
    "shrunk and int8, trained for both": (["filters", "int8"], True),
}
CALLBACKS = {
    "weights": lambda: SparsifyCallback(SPARSITY),
    "filters": lambda: SparsifyCallback(FILTERS, "filter", "local"),
    "int8": QuantizeCallback,
}


def net(width):
    "Three of fastai's ConvLayers, and a linear layer"
    return nn.Sequential(
        ConvLayer(1, width), ConvLayer(width, 2 * width), ConvLayer(2 * width, 2 * width, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def trained(train, valid, names, seed, epochs, width):
    "A Learner whose model was trained with these callbacks, and shrunk if filters were pruned"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    torch.manual_seed(seed)
    loaders = [
        DataLoader(list(zip(*part, strict=True)), bs=64, shuffle=place == 0)
        for place, part in enumerate((train, valid))
    ]
    learn = Learner(DataLoaders(*loaders, device="cpu"), net(width), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2, cbs=[CALLBACKS[name]() for name in names])
    if "filters" in names:
        learn.shrink(train[0][:2])
    return learn


def session_of(path):
    "A session of one thread"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def cpu_seconds(session, inputs):
    "Seconds that this thread, in which the session computes, has a CPU for one run"
    start = time.thread_time()
    session.run(None, inputs)
    return time.thread_time() - start


def measured(seed, epochs, width, folder):
    "One dictionary for each case"
    train, valid = digits(seed)
    learners, rows, sessions = {}, {}, {}
    for number, (name, (names, is_int8)) in enumerate(CASES.items()):
        key = tuple(names)
        if key not in learners:
            learners[key] = trained(train, valid, names, seed, epochs, width)
        model, path, sparse = learners[key].model.eval(), folder / f"{number}.onnx", folder / f"{number}.safetensors"
        if is_int8:
            file = quantize(model, [(train[0][:512], None)], path)
            stored, zeros = file.save_sparse(sparse), file.count.sparsity
        else:
            path.write_bytes(export_float(model, (train[0][:2],), path).SerializeToString())
            stored = save_sparse(model, sparse)
            matrices = [each for each in model.parameters() if each.dim() > 1]
            zeros = sum(int((each == 0).sum()) for each in matrices) / sum(each.numel() for each in matrices)
        sessions[name] = session_of(path)
        (given,) = (each.name for each in sessions[name].get_inputs())
        (outputs,) = sessions[name].run(None, {given: valid[0].numpy()})
        rows[name] = {
            "accuracy": float((outputs.argmax(1) == valid[1].numpy()).mean()),
            "zeros": zeros,
            "bytes": path.stat().st_size,
            "bytes sparse": stored.bytes,
        }
    batch = train[0][:64].numpy()
    names = {name: session.get_inputs()[0].name for name, session in sessions.items()}
    seconds = interleaved(
        {name: lambda _, name=name: cpu_seconds(sessions[name], {names[name]: batch}) for name in sessions},
        60,
    )
    for name, row in rows.items():
        row["latency"] = seconds[name] / seconds["dense"]
    rows["dense"]["milliseconds"] = 1000 * seconds["dense"]
    return rows


def table(runs):
    "The rows of all seeds in Markdown"
    lines = [
        "| | accuracy, % | zeros | ONNX file, kB | sparse file, kB | latency |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        of = {key: [run[name][key] for run in runs] for key in runs[0][name]}
        spread = f" ± {100 * stdev(of['accuracy']):.1f}" if len(runs) > 1 else ""
        lines.append(
            f"| {name} | {100 * mean(of['accuracy']):.1f}{spread} | {mean(of['zeros']):.0%} | "
            f"{mean(of['bytes']) / 1000:.0f} | {mean(of['bytes sparse']) / 1000:.0f} | {np.median(of['latency']):.2f} |"
        )
    return "\n".join(lines)


def main(seeds, epochs, width, folder):
    "Run all seeds, and write the table"
    torch.set_num_threads(1)
    facts = {**surroundings(), "onnxruntime": onnxruntime.__version__}
    runs = []
    with TemporaryDirectory() as files:
        for seed in range(seeds):
            runs.append(measured(seed, epochs, width, Path(files)))
            print(f"\n{table(runs)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    dense = np.median([run["dense"]["milliseconds"] for run in runs])
    text = f"{seeds} seeds, {epochs} epochs, width {width}; dense: {dense:.1f} ms for 64 pictures; {words}"
    write_text(folder / "quantization.md", f"{table(runs)}\n\n{text}\n")
    write_text(folder / "quantization.json", json.dumps({"surroundings": facts, "runs": runs}, indent=1))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(given.seeds, given.epochs, given.width, given.out)
