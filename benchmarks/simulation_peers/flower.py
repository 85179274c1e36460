"""The same work with Flower's simulation over Ray."""
# mypy: ignore-errors
# Flower lives in an environment of its own, where nothing is type-checked.

from functools import cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.simulation_peers.marks import Marks
from benchmarks.simulation_peers.work import Arrays, Work, accuracy, first_model, train


@cache
def _held(work: Work):
    """The arrays and a model: read once in each of Ray's processes."""
    torch.set_num_threads(1)
    arrays = Arrays(work)
    return arrays, first_model(work, arrays)


class CountingFedAvg(FedAvg):
    """FedAvg that counts the answers it averages."""

    counted = 0

    def aggregate_train(self, server_round, replies):
        """Average the answers that are no errors."""
        answers = list(replies)
        self.counted = sum(answer.has_content() for answer in answers)
        return super().aggregate_train(server_round, answers)


def client_app(work: Work) -> ClientApp:
    """The client: one model in each process, set to the weights that came."""
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        arrays, model = _held(work)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        samples = arrays.tensors_of(int(context.node_config["partition-id"]))
        train(model, samples, work)
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(samples[1])}),
            }
        )
        return Message(content=content, reply_to=message)

    return app


def server_app(work: Work, marks: Marks) -> ServerApp:
    """The server: FedAvg, with the model measured centrally at the end of each round."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, _context: Context) -> None:
        arrays, model = _held(work)

        def measure(number: int, weights: ArrayRecord) -> MetricRecord:
            if number > 0:
                model.load_state_dict(weights.to_torch_state_dict())
                marks.mark(strategy.counted, accuracy(model, arrays.held_out))
            return MetricRecord({"accuracy": marks.accuracy})

        strategy = CountingFedAvg(
            fraction_train=work.per_round / work.clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.per_round,
            min_available_nodes=work.clients,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=work.rounds,
            train_config=ConfigRecord({}),
            evaluate_fn=measure,
        )

    return app


def run(work: Work) -> Marks:
    """Do the work: its marks."""
    marks = Marks(work.rounds)
    run_simulation(
        server_app=server_app(work, marks),
        client_app=client_app(work),
        num_supernodes=work.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": work.processes},
        },
    )
    return marks
