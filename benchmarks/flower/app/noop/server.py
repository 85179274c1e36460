"""The server: FedAvg over all nodes, and the moment at which each round was over."""
# mypy: ignore-errors
# Flower lives in an environment of its own, where nothing is type-checked.

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; each appends its end to the file `marks`, the start being round 0."""
    settings = context.run_config
    nodes, marks = int(settings["nodes"]), Path(str(settings["marks"]))

    def note(_round: int, _arrays: ArrayRecord) -> MetricRecord:
        with marks.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        return MetricRecord({"measured": 1.0})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_available_nodes=nodes,
    )
    weights = np.zeros(int(settings["parameters"]), np.float32)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([weights]),
        num_rounds=int(settings["rounds"]),
        evaluate_fn=note,
    )
